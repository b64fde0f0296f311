"""What a run does before several processes work together, and how all of them end where one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.config.deepspeed import USED
from glm_edge_ft.errors import UserError
from glm_edge_ft.training import deepspeed
from glm_edge_ft.training.deepspeed import check_deepspeed_values, wait_for_compilations
from tests.launch import REPOSITORY, launch, start_script
from tests.runs import do_run, losses, write_config

# Rank 1 fails while rank 0 waits for it in a collective; or both fail alike.
FAILING_SCRIPT = """
import os, sys, typer
from glm_edge_ft.cli import run_command
from glm_edge_ft.errors import RunStopped, UserError

def act():
    import torch
    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1" or sys.argv[2] == "all":
        if sys.argv[1] == "input":
            raise UserError.single("cat.png", "is no image", "replace it")
        raise {"stop": RunStopped("the loss is nan"), "crash": ZeroDivisionError("division by zero")}[sys.argv[1]]
    torch.distributed.barrier()

app = typer.Typer()
app.command(context_settings={"allow_extra_args": True})(lambda: run_command(act))
app()
"""


def test_the_lock_of_a_killed_compilation_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """T7, K6: torch would wait for it without end; locks of other operators stay."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    stale, foreign = (tmp_path / "py311_cpu" / name / "lock" for name in ("deepspeed_shm_comm", "not_of_deepspeed"))
    for lock in (stale, foreign):
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - 60, time.time() - 60))
    wait_for_compilations()
    assert not stale.exists()
    assert foreign.exists()
    assert f"{stale}: removed" in capsys.readouterr().err


OWNER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
print(baton.try_acquire(), flush=True)
time.sleep(3600)
"""


def test_a_compilation_that_goes_on_is_waited_for_until_its_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """K6: the message names the process; when it is killed, its lock counts as left behind, however new."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(deepspeed, "SECONDS_TO_SEE_A_LOCK", 0.0)
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(lock)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"True\n"
    threading.Timer(3, owner.kill).start()
    wait_for_compilations()
    owner.wait()
    waiting, removed = capsys.readouterr().err.splitlines()
    assert f"{lock}: waiting for process {owner.pid}" in waiting
    assert f"{lock}: removed" in removed
    assert not lock.exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, []),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "big", "offload_param": {"pin_memory": "so"}}},
            ["zero_optimization.reduce_bucket_size is `big`", "zero_optimization.offload_param.pin_memory is `so`"],
        ),
        (
            {"communication_data_type": "int3"},
            [" DeepSpeed refuses these settings: ValueError: Invalid communication_data_type"],
        ),
        ({"communication_data_type": 3}, [" DeepSpeed refuses these settings: AttributeError: "]),
        ({"wall_clock_breakdown": "yes"}, [" DeepSpeed refuses these settings: TypeError: "]),
        ({"zero_optimization": {"mics_shard_size": 2}}, [" DeepSpeed refuses these settings: DeepSpeedConfigError: "]),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, ["fp16"]),
    ],
)
def test_values_that_deepspeed_refuses_are_found_before_the_weights(
    settings: dict[str, Any], expected: list[str]
) -> None:
    """C6, K5: each with its key, whatever its parser raises; DeepSpeed says so only once the model is there."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    found = [f"{key} {reason}" for key, reason in check_deepspeed_values(settings)]
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("compiler", "device", "expected"),
    [
        ("c++", "nvme", ["zero_optimization.offload_optimizer.device"]),
        ("no-such-compiler", "none", []),
        ("no-such-compiler", "cpu", [""]),
    ],
)
def test_what_deepspeed_lacks_to_compile_is_found_before_the_weights(
    compiler: str, device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """K5: DeepSpeed says so with a trace of the build, once the model is there."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setitem(installed_ops, "cpu_adam", compiler == "c++")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)  # as without libaio
    zero = {"stage": 2, "offload_optimizer": {"device": device, "nvme_path": "/tmp"}}
    assert [key for key, _ in check_deepspeed_values({"zero_optimization": zero})] == expected


def fail(folder: Path, kind: str, who: str) -> str:
    """Let one rank of two fail, or both, and return what was printed."""
    script = folder / "failing.py"
    script.write_text(FAILING_SCRIPT, encoding="utf-8")
    environment = {"PYTHONPATH": str(REPOSITORY)}
    run = start_script(script, [kind, who], folder / "log.txt", processes=2, environment=environment)
    return run.end(code=1)  # torchrun's own


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("input", "error: 1 problem in the input\ncat.png: is no image\n    -> replace it\n(rank 1 of 2)\n"),
        ("stop", "stopped: the loss is nan\n(rank 1 of 2)\n"),
        ("crash", "error: unexpected ZeroDivisionError: division by zero\n(rank 1 of 2)\n"),
    ],
)
def test_a_rank_that_fails_alone_ends_all_with_its_message(tmp_path: Path, kind: str, message: str) -> None:
    """T7: rank 0, whose connection to it is lost, adds none of its own."""
    said = fail(tmp_path, kind, "one")
    assert said.count(message) == 1
    assert "Connection closed" not in said


SILENT_SCRIPT = """
import os, time, typer
from glm_edge_ft.cli import run_command
from glm_edge_ft.distributed import explain_peer_failure, init_cpu_process_group

def act():
    import torch
    init_cpu_process_group(None, 3)
    if os.environ["RANK"] == "1":
        time.sleep(3600)
    with explain_peer_failure(lambda: "start again"):
        torch.distributed.barrier()

app = typer.Typer()
app.command()(lambda: run_command(act))
app()
"""


def test_a_process_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """T7: on CPUs too `ddp_timeout` says when."""
    script = tmp_path / "silent.py"
    script.write_text(SILENT_SCRIPT, encoding="utf-8")
    run = start_script(script, [], tmp_path / "log", processes=2, environment={"PYTHONPATH": str(REPOSITORY)})
    message = "stopped: another process of the run is gone, or does not answer (Timed out waiting 3000ms for "
    assert run.end(code=1).count(message) == 1


@pytest.mark.parametrize(
    ("kind", "message"), [("input", "error: 1 problem in the input"), ("crash", "error: unexpected")]
)
def test_what_all_ranks_have_in_common_is_said_once(tmp_path: Path, kind: str, message: str) -> None:
    """T7: whichever of them comes first."""
    assert fail(tmp_path, kind, "all").count(message) == 1


def test_check_refuses_what_deepspeed_cannot_run_here(chat_folder: Path) -> None:
    """K5, K7: all at once and each by its key, by the real command; nothing heavy is imported for it."""
    zero = {"stage": "two", "cpu_offload": True, "mics_shard_size": 2, "zero_quantized_weights": True}
    path = chat_folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, "fp16": True, "optimizer": "AdamW"}), encoding="utf-8")
    top = {"on_nonfinite_loss": "warn"}
    config = write_config(chat_folder / "output", top=top, deepspeed=str(path))
    arguments = [str(chat_folder / "data"), str(chat_folder / "model"), str(config), "--check"]
    run = start_script(REPOSITORY / "finetune.py", arguments, chat_folder / "log", processes=1, environment={})
    said = run.end(code=2)
    assert said.startswith("error: 7 problems in the input; nothing was trained\n")
    for key in (*(f"zero_optimization.{key}" for key in zero), "fp16", "optimizer", "on_nonfinite_loss"):
        assert key in said


def test_check_gives_the_json_to_deepspeeds_own_parser(chat_folder: Path) -> None:
    """K5: what it refuses is a mistake in the input, with the key where it names one."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    path = chat_folder / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}}', encoding="utf-8")
    where = r"training_args.deepspeed: ds.json: zero_optimization.reduce_bucket_size is `0`"
    folders = chat_folder / "out", chat_folder / "data", chat_folder / "model"
    with pytest.raises(UserError, match=where):
        do_run(*folders, check=True, deepspeed=str(path))
    with pytest.raises(UserError, match=r"training_args.deepspeed: differs from other settings: .*bf16_full_eval"):
        do_run(*folders, check=True, deepspeed={"zero_optimization": {"stage": 2}}, bf16_full_eval=True)


# Values other than DeepSpeed's defaults for the keys that reach it; offloading has tests of its own.
OF_STAGE_2 = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "allgather_partitions": False,
    "allgather_bucket_size": 1000,
    "reduce_bucket_size": 1000,
    "overlap_comm": True,
    "round_robin_gradients": True,
    "ignore_unused_parameters": False,
}
OF_STAGE_3 = {
    "contiguous_gradients": False,
    "reduce_bucket_size": 1000,
    "sub_group_size": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_gather_16bit_weights_on_model_save": False,
    "stage3_gather_fp16_weights_on_model_save": True,
    "memory_efficient_linear": False,
    "log_trace_cache_warnings": True,
}
OF_ALL = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "wall_clock_breakdown": True}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "values"), [(2, OF_STAGE_2), (3, OF_STAGE_3)])
def test_every_key_that_reaches_deepspeed_trains(stage: int, values: dict[str, Any], chat_folder: Path) -> None:
    """K5: two processes, each key at another value than its default, give the losses of the defaults."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    elsewhere = {"stage", "offload_optimizer", "offload_param"}
    assert set(OF_STAGE_2) | set(OF_STAGE_3) | elsewhere == set(USED["zero_optimization"])
    found = {}
    for name, zero, more in (("plain", {}, {}), ("other", values, OF_ALL)):
        settings = {"zero_optimization": {"stage": stage, **zero}, **more}
        (chat_folder / f"{name}.json").write_text(json.dumps(settings), encoding="utf-8")
        path = str(chat_folder / f"{name}.json")
        data, model = chat_folder / "data", chat_folder / "model"
        output = launch(chat_folder / name, data, model, processes=2, peft=None, max_steps=2, deepspeed=path)
        found[name] = losses(output)
    assert found["other"].keys() == found["plain"].keys()
    for step, (loss, *_) in found["plain"].items():
        assert found["other"][step][0] == pytest.approx(loss, rel=1e-3)
