"""Files that appear whole or not at all, paths that do not exist, and two runs with one output folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.errors import UserError
from glm_edge_ft.files import append_text, atomic_path, did_you_mean, lock_folder, write_text_atomically
from tests.launch import Started, launch, start
from tests.runs import files_of_at_most, losses

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


def test_a_text_replaces_an_earlier_one(tmp_path: Path) -> None:
    """In a folder that is made where it is missing; nothing else is left there."""
    path = tmp_path / "new" / "run.json"
    for text in ("一", "二\n"):
        write_text_atomically(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    """With all it holds; a folder with content is not replaced."""
    path = tmp_path / "model"
    path.mkdir()
    with atomic_path(path) as staged:
        (staged / "part").mkdir(parents=True)
        (staged / "part" / "a").write_bytes(b"1")
    assert (path / "part" / "a").read_bytes() == b"1"
    with pytest.raises(OSError, match="not empty"), atomic_path(path) as staged:
        staged.mkdir()
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content(tmp_path: Path, error: type[BaseException]) -> None:
    """And no half-written file."""
    path = tmp_path / "run.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(error), atomic_path(path) as staged:
        staged.write_text("new", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fault(by_default=True)
def test_a_killed_process_leaves_the_old_content_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    """SIGKILL while it writes."""
    path = tmp_path / "run.json"
    path.write_text("old", encoding="utf-8")
    program = (
        "import os, sys; from pathlib import Path; from glm_edge_ft.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as staged:\n"
        f"    staged.write_text('half'); os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_text_atomically(path, "new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fault(by_default=True)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """Nothing of an appended text is left; a file that is written anew keeps its old content."""
    path = tmp_path / "metrics.jsonl"
    append_text(path, "12345\n")
    with files_of_at_most(10):
        for write in (append_text, write_text_atomically):
            with pytest.raises(OSError, match="File too large"):
                write(path, "0123456789abc\n")
    assert path.read_text(encoding="utf-8") == "12345\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_closest_existing_path_is_named(tmp_path: Path) -> None:
    """Part by part; nothing where no name is close."""
    (tmp_path / "models" / "glm-edge-1.5b").mkdir(parents=True)
    wrong = tmp_path / "model" / "glm-edge-1.5"
    assert did_you_mean(wrong) == f"did you mean {tmp_path / 'models' / 'glm-edge-1.5b'}? "
    assert did_you_mean(Path("model"), tmp_path) == "did you mean models? "
    assert did_you_mean(tmp_path / "nothing-like-it") == did_you_mean(Path("x" * 300), tmp_path) == ""
