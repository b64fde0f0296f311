"""What a run does before several processes work together."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from glm_edge_ft.distributed import remove_stale_locks


def test_the_lock_of_a_killed_compilation_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """T7: torch would wait for it without end; the lock of a compilation that is going on stays, and so do others'."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    stale, fresh = (tmp_path / "py311_cpu" / name / "lock" for name in ("deepspeed_shm_comm", "cpu_adam"))
    foreign = tmp_path / "py311_cpu" / "an_operator_of_others" / "lock"
    for lock, age in ((stale, 3600), (fresh, 5), (foreign, 3600)):
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
    remove_stale_locks()
    assert not stale.exists()
    assert fresh.exists()
    assert foreign.exists()
    assert f"{stale}: removed" in capsys.readouterr().err
