"""What a run does before several processes work together, and how all of them end where one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from glm_edge_ft.training import deepspeed
from glm_edge_ft.training.deepspeed import wait_for_compilations
from tests.launch import REPOSITORY, start_script

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
