"""Two runs with one output folder, in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.errors import UserError
from glm_edge_ft.files import lock_folder
from tests.launch import Started, launch, start
from tests.runs import losses

LONG: dict[str, Any] = {"max_steps": 100_000, "save_steps": 100_000, "peft": None}


def has_begun(output: Path) -> bool:
    """Whether a run has logged a step."""
    return (output / "metrics.jsonl").is_file()


def test_the_second_run_in_a_folder_is_refused_and_a_killed_one_is_not_in_the_way(chat_folder: Path) -> None:
    """K18: exit code 2, the first is named and goes on untouched; after SIGKILL the folder is free at once."""
    output, data, model = chat_folder / "output", chat_folder / "data", chat_folder / "model"
    first = start(output, data, model, **LONG)
    try:
        first.wait_until(lambda: has_begun(output), "a step")
        files = {path.name for path in output.iterdir()}
        refused = _second(output, data, model)
        said = refused.end(code=2)
        assert f"training_args.output_dir: {output} is in use by another run: process {first.process.pid} on" in said
        assert "Traceback" not in said
        assert {path.name for path in output.iterdir()} == files
        assert first.process.poll() is None
    finally:
        first.kill()
    launch(output, data, model, max_steps=1, save_strategy="no")
    assert list(losses(output)) == [1]
    assert not (output / ".lock").exists()


def _second(output: Path, data: Path, model: Path) -> Started:
    (output.parent / "second").mkdir()
    other = output.parent / "second" / output.name  # its config and log; the folder that it names is the first one's
    return start(other, data, model, output_dir=str(output), max_steps=1)


def test_a_lock_file_that_its_run_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K18: else a start in the moment in which a run ends would hold a file that nobody else can see."""
    import fcntl

    lock_a_file = fcntl.flock
    opened: list[Any] = []

    def remove_first(file: Any, how: int) -> None:
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(file)
        lock_a_file(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with lock_folder(tmp_path, "here"):
        assert len(opened) == 2
        with (
            pytest.raises(UserError, match=r"here: .* is in use by another run: process"),
            lock_folder(tmp_path, "here"),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
