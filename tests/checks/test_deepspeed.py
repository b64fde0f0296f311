"""DeepSpeed's JSON before the weights: what transformers and DeepSpeed make of it, by the real command (K5, K7, C6)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.checks.deepspeed import refused_by_deepspeed
from glm_edge_ft.config.deepspeed import deepspeed_keys
from glm_edge_ft.errors import UserError
from tests.launch import REPOSITORY, launch, start_script
from tests.runs import do_run, losses, write_config


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
            ["DeepSpeed refuses these settings: ValueError: Invalid communication_data_type"],
        ),
        ({"communication_data_type": 3}, ["DeepSpeed refuses these settings: AttributeError: "]),
        ({"wall_clock_breakdown": "yes"}, ["DeepSpeed refuses these settings: TypeError: "]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["DeepSpeed refuses these settings: DeepSpeedConfigError: "]),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, ["fp16"]),
    ],
)
def test_values_that_deepspeed_refuses_are_found_before_the_weights(
    settings: dict[str, Any], expected: list[str]
) -> None:
    """C6, K5: each with its key, whatever its parser raises; DeepSpeed says so only once the model is there."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    found = list(refused_by_deepspeed(settings))
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("compiler", "device", "expected"),
    [
        ("c++", "nvme", ["zero_optimization.offload_optimizer.device"]),
        ("no-such-compiler", "none", []),
        ("no-such-compiler", "cpu", ["DeepSpeed compiles cpu_adam"]),
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
    found = list(refused_by_deepspeed({"zero_optimization": zero}))
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


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
    with pytest.raises(UserError, match=r"training_args.deepspeed: bf16.enabled=False, but bf16\|bf16_full_eval=True"):
        do_run(*folders, check=True, deepspeed={"zero_optimization": {"stage": 2}}, bf16_full_eval=True)


def test_check_lists_all_that_contradicts_the_yaml(chat_folder: Path) -> None:
    """C6: each value of the JSON that differs from the arguments, defaults and the length of the run among them."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    params = {"lr": 1, "betas": [0.8, 0.9], "eps": 1, "weight_decay": 1}
    warmup = {"warmup_max_lr": 1, "warmup_num_steps": 7, "total_num_steps": 9}
    settings = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 64,
        "gradient_clipping": 2,
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {"type": "WarmupDecayLR", "params": warmup},
    }
    path = chat_folder / "ds.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    folders = chat_folder / "out", chat_folder / "data", chat_folder / "model"
    with pytest.raises(UserError) as caught:
        do_run(*folders, check=True, max_steps=100, deepspeed=str(path))
    assert {problem.where for problem in caught.value.problems} == {"training_args.deepspeed"}
    assert {problem.what.removeprefix("ds.json: ").partition("=")[0] for problem in caught.value.problems} == {
        *(key for key in settings if key not in ("optimizer", "scheduler")),
        *(f"optimizer.params.{key}" for key in params),
        *(f"scheduler.params.{key}" for key in warmup),
    }
    assert all('write "auto" there' in problem.fix for problem in caught.value.problems)


def test_equal_values_and_auto_are_no_contradiction(chat_folder: Path) -> None:
    """C6: as many files of other tools have them."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 2,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "betas": [0.9, 0.999], "eps": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 100, "warmup_num_steps": 3, "warmup_max_lr": "auto", "warmup_min_lr": 0},
        },
    }
    folders = chat_folder / "out", chat_folder / "data", chat_folder / "model"
    run: dict[str, Any] = {"max_steps": 100, "warmup_steps": 0.03, "learning_rate": 5e-5}
    do_run(*folders, check=True, deepspeed=settings, per_device_train_batch_size=2, **run)


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
    assert set(OF_STAGE_2) | set(OF_STAGE_3) | elsewhere == set(deepspeed_keys()["zero_optimization"].fields)
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
