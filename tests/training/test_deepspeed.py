"""Locks of DeepSpeed's operators: those of killed runs are removed, a compilation that goes on is waited for."""

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

pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")


def test_the_lock_of_a_killed_compilation_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """T7, K6: torch would wait for it without end; locks of other operators stay."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
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
