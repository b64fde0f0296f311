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
    """T7: torch would wait for it without end; the lock of a compilation that is going on stays."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, fresh = tmp_path / "killed" / "lock", tmp_path / "running" / "lock"
    for lock, age in ((stale, 3600), (fresh, 5)):
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
    remove_stale_locks()
    assert not stale.exists()
    assert fresh.exists()
    assert f"{stale}: removed" in capsys.readouterr().err
