"""Several machines: a torchrun for each, joined over this machine's loopback address."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft import machines
from glm_edge_ft.errors import ProcessLost, UserError
from glm_edge_ft.training.checkpoints import find_checkpoints
from glm_edge_ft.training.lost_process import explain_lost_process
from tests.conftest import TokenizerMaker
from tests.launch import REPOSITORY, Started, end_all, launch, start_machines
from tests.model_folders import save_model_folder
from tests.runs import LORA, assert_close, assert_same_bits, do_run, losses, write_chat_data, write_config

# The second machine finds a mistake in its input, or has a folder of its own, while the first waits for it.
MEETING_SCRIPT = """
import os, sys, typer
from pathlib import Path
from glm_edge_ft import machines
from glm_edge_ft.cli import run_command
from glm_edge_ft.errors import UserError

machines.SECONDS_TO_SEE_A_FILE = 1

def act():
    if sys.argv[1] == "input" and os.environ["RANK"] == "1":
        raise UserError.single("MODEL glm", "there is no such folder", "copy it there")
    machines.meet("the end of the preparations")
    machines.check_shared_folder(Path(sys.argv[2]), None, {})
    print("all are here")

app = typer.Typer()
app.command(context_settings={"allow_extra_args": True})(lambda: run_command(act))
app()
"""


def hold_meeting(folder: Path, kind: str, output_dirs: tuple[Path, Path]) -> list[str]:
    """Run MEETING_SCRIPT on two machines with these output folders, and return what each printed."""
    script = folder / "meeting.py"
    script.write_text(MEETING_SCRIPT, encoding="utf-8")
    for output in output_dirs:
        output.mkdir(exist_ok=True)
    arguments = [[kind, str(output)] for output in output_dirs]
    runs = start_machines(script, arguments, folder / "log", environment={"PYTHONPATH": str(REPOSITORY)})
    return end_all(runs, code=1)  # torchrun's own


def test_a_mistake_on_one_machine_ends_the_others_with_its_message(tmp_path: Path) -> None:
    """T7: they would wait for it in a collective for half an hour; torchrun knows of its own machine alone."""
    said = sorted(hold_meeting(tmp_path, "input", (tmp_path / "a", tmp_path / "a")))
    mistake = "error: 1 problem in the input\nMODEL glm: there is no such folder\n"
    assert [text.count(mistake) for text in said] == [1, 1]
    assert [text.count(f", failed:\n{mistake}") for text in said] == [0, 1]
    assert said[1].startswith("stopped: process 1, on machine ")


def test_an_output_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    """R3: each process lays its part of a checkpoint there, and looks for it there."""
    for said in hold_meeting(tmp_path, "folder", (tmp_path / "a", tmp_path / "b")):
        assert "where process 0 writes\n    -> name a folder that all machines share" in said
    assert [list(folder.iterdir()) for folder in (tmp_path / "a", tmp_path / "b")] == [[], []]


def test_another_checkpoint_than_that_of_the_first_process_is_refused(tmp_path: Path) -> None:
    """R3: a network folder may show the newest one late; the machines would train from different steps."""
    (tmp_path / "mark").touch()
    first = {"machine": "one", "mark": "mark", "resume": "checkpoint-4"}
    machines._compare_folders(tmp_path, "checkpoint-4", first)
    with pytest.raises(UserError, match=r"found no checkpoint in .*, machine one checkpoint-4\n    -> start again"):
        machines._compare_folders(tmp_path, None, first)


def test_other_rows_than_those_of_the_first_process_are_refused() -> None:
    """K1, T3: machines with other numbers of rows would take other numbers of steps, and wait without end."""
    first = {"machine": "one", "rows": {"train": [1204, 7], "val": [5, 3]}}
    machines._compare_rows({"train": [1204, 7], "val": [5, 3]}, first)
    with pytest.raises(UserError) as caught:
        machines._compare_rows({"train": [1203, 8], "val": [5, 4]}, first)
    assert [problem.where for problem in caught.value.problems] == ["DATA_DIR: train", "DATA_DIR: val"]
    assert "1,203 rows on machine " in caught.value.problems[0].what
    assert ", 1,204 on machine one" in caught.value.problems[0].what


def test_one_machine_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """T7: torchrun itself ends all its processes; no connection is made."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    machines.meet("nowhere")
    machines.tell_failure("nothing")
    machines.check_shared_folder(tmp_path, None, {})
    assert list(tmp_path.iterdir()) == []


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:5. This is "
    "typically caused by a remote worker crashing."
)


def test_a_closed_connection_is_explained(tmp_path: Path) -> None:
    """T7, R1: what happened, and that there is nothing to go on from."""
    with pytest.raises(ProcessLost) as caught, explain_lost_process(tmp_path):
        raise RuntimeError(GLOO)
    assert str(caught.value) == (
        "another process of the run is gone, or does not answer (Connection closed by peer [10.0.0.2]:5); why, its own "
        "output says, perhaps on another machine; no checkpoint was written yet, so the same command, on all machines, "
        "starts from the beginning"
    )


def test_an_error_of_this_process_stays_what_it_is(tmp_path: Path) -> None:
    """T7: it is shown with its traceback."""
    with pytest.raises(RuntimeError, match="the size of tensor a"), explain_lost_process(tmp_path):
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
