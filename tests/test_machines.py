"""Several machines: a torchrun for each, joined over this machine's loopback address."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.checks.machines import MachineState, check_same_on_all_machines, compare_machines
from glm_edge_ft.distributed import barrier, explain_peer_failure, report_failure
from glm_edge_ft.errors import Problem, ProcessLost, UserError
from glm_edge_ft.training.checkpoints import find_checkpoints
from tests.conftest import TokenizerMaker
from tests.launch import REPOSITORY, Started, end_all, launch, start_machines
from tests.model_folders import save_model_folder
from tests.runs import LORA, assert_close, assert_same_bits, do_run, losses, write_chat_data, write_config

# The second machine finds an error in its input, dies, or has a folder of its own, while the first waits for it.
BARRIER_SCRIPT = """
import os, sys, typer
from pathlib import Path
from glm_edge_ft.checks import machines
from glm_edge_ft.cli import run_command
from glm_edge_ft.distributed import barrier, init_cpu_process_group
from glm_edge_ft.errors import UserError

machines.SECONDS_TO_SEE_A_FILE = 1

def act():
    kind, is_second = sys.argv[1], os.environ["RANK"] == "1"
    if kind == "input" and is_second:
        raise UserError.single("MODEL glm", "there is no such folder", "copy it there")
    barrier()
    if kind == "rows" and is_second:
        raise UserError.single("train.jsonl:7", "is no row", "correct it")
    if kind == "dies" and is_second:
        os.kill(os.getpid(), 9)
    barrier()
    init_cpu_process_group(None, 60)
    machines.check_same_on_all_machines(Path(sys.argv[2]), None, {})
    print("all are here")

app = typer.Typer()
app.command(context_settings={"allow_extra_args": True})(lambda: run_command(act))
app()
"""


def meet(folder: Path, kind: str, output_dirs: tuple[Path, Path]) -> list[str]:
    """Run BARRIER_SCRIPT on two machines with these output folders, and return what each printed."""
    script = folder / "meeting.py"
    script.write_text(BARRIER_SCRIPT, encoding="utf-8")
    for output in output_dirs:
        output.mkdir(exist_ok=True)
    arguments = [[kind, str(output)] for output in output_dirs]
    runs = start_machines(script, arguments, folder / "log", environment={"PYTHONPATH": str(REPOSITORY)})
    return end_all(runs, code=1)  # torchrun's own


@pytest.mark.parametrize(
    ("kind", "problem"), [("input", "MODEL glm: there is no such folder"), ("rows", "train.jsonl:7: is no row")]
)
def test_an_error_on_one_machine_ends_the_others_at_once(tmp_path: Path, kind: str, problem: str) -> None:
    """T7: they would wait for it in a collective for half an hour; torchrun knows of its own machine alone."""
    said = meet(tmp_path, kind, (tmp_path / "a", tmp_path / "a"))
    assert sorted(text.count(f"error: 1 problem in the input\n{problem}\n") for text in said) == [0, 1]
    assert sorted(text.count("stopped: process 1 of 2 failed; its output, perhaps on ") for text in said) == [0, 1]


def test_a_process_that_dies_ends_the_others_at_once(tmp_path: Path) -> None:
    """T7: it could say nothing; the connection to it is closed."""
    said = meet(tmp_path, "dies", (tmp_path / "a", tmp_path / "a"))
    assert sorted(text.count("stopped: another process of the run is gone, or does not") for text in said) == [0, 1]


def test_an_output_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    """R3: each process writes its part of a checkpoint there, and looks for it there."""
    for said in meet(tmp_path, "folder", (tmp_path / "a", tmp_path / "b")):
        assert "where process 0 writes\n    -> name a folder that all machines share" in said
    assert [list(folder.iterdir()) for folder in (tmp_path / "a", tmp_path / "b")] == [[], []]


FIRST = MachineState("one", "checkpoint-4", {"train": [1204, 7], "val": [5, 3]}, sees_folder=True)


@pytest.mark.parametrize(
    ("changes", "places", "text"),
    [
        ({}, [], ""),
        ({"resume": None}, ["RESUME"], "machine two found no checkpoint in out, machine one checkpoint-4"),
        (
            {"rows": {"train": [1203, 8], "val": [5, 4]}},
            ["DATA_DIR: train", "DATA_DIR: val"],
            "1,203 rows on machine two, 1,204 on machine one",
        ),
    ],
)
def test_machines_that_differ_are_refused(changes: dict[str, Any], places: list[str], text: str) -> None:
    """R3, K1, T3: a network folder may show the newest checkpoint late; other rows would be other steps."""
    problems: tuple[Problem, ...] = ()
    try:
        compare_machines([FIRST, replace(FIRST, machine="two", **changes)], Path("out"))
    except UserError as error:
        problems = error.problems
    assert [problem.where for problem in problems] == places
    assert text in "".join(problem.what for problem in problems)


def test_one_machine_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """T7: torchrun itself ends all its processes; no connection is made."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    barrier()
    report_failure()
    check_same_on_all_machines(tmp_path, None, {})
    assert list(tmp_path.iterdir()) == []


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:5. This is "
    "typically caused by a remote worker crashing."
)


def test_a_closed_connection_is_explained() -> None:
    """T7, R1: what happened, and what to do."""
    with pytest.raises(ProcessLost) as caught, explain_peer_failure(lambda: "start again"):
        raise RuntimeError(GLOO)
    assert str(caught.value) == (
        "another process of the run is gone, or does not answer (Connection closed by peer [10.0.0.2]:5); its output, "
        "perhaps on another machine, says why; start again"
    )


def test_an_error_of_this_process_stays_what_it_is() -> None:
    """T7: it is shown with its traceback."""
    with pytest.raises(RuntimeError, match="the size of tensor a"), explain_peer_failure(lambda: ""):
        raise RuntimeError("the size of tensor a must match")


# --- whole runs
@pytest.fixture
def folder(tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a tiny chat model and its data."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    write_chat_data(tmp_path / "data", train=20)
    return tmp_path


def start_training(folder: Path, output: Path, resume: str | None = None, **settings: Any) -> list[Started]:
    """Start finetune.py on two machines that share the output folder."""
    config = write_config(output, **settings, per_device_train_batch_size=2)
    arguments = [str(folder / "data"), str(folder / "model"), str(config), *([resume] if resume else [])]
    log = folder / f"{output.name}-{resume}.log"
    return start_machines(REPOSITORY / "finetune.py", [arguments, arguments], log, environment=os.environ)


def test_two_machines_train_the_model_of_one_process(folder: Path) -> None:
    """T3: the same losses and weights."""
    settings: dict[str, Any] = {"peft": {**LORA, "lora_dropout": 0.0}, "learning_rate": 1e-3}
    end_all(start_training(folder, folder / "two", **settings))
    assert_close(do_run(folder / "one", folder / "data", folder / "model", **settings), folder / "two")


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_run_and_both_go_on(folder: Path) -> None:
    """R1, R3: with dropout and all, the weights are those of two processes that were never interrupted."""
    output = folder / "killed"
    settings: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    survivor, victim = start_training(folder, output, max_steps=1_000_000, **settings)
    try:
        survivor.wait_until((output / "checkpoint-4").is_dir, "checkpoint 4")
    finally:
        victim.kill()
    said = survivor.end(code=1)
    newest = [found for found in find_checkpoints(output) if not found.defect][-1]
    assert said.count("stopped: another process of the run is gone, or does not answer (") == 1
    way = "and the same command, on all machines, with `yes` as RESUME goes on from it"
    assert f"{newest.path} is whole, {way}" in said
    settings["max_steps"] = newest.step + 3
    end_all(start_training(folder, output, resume="yes", **settings))
    whole, data, model = folder / "whole", folder / "data", folder / "model"
    launch(whole, data, model, processes=2, per_device_train_batch_size=2, **settings)
    assert losses(output) == losses(whole)
    assert_same_bits(output, whole)
