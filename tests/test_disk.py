"""Disks that are full, become full, or can only be read: in a mount namespace of its own, real errors of a real disk.

What such a run says is held to the word, and what it leaves is resumed and compared with a run that had room.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.errors import RunStopped
from glm_edge_ft.training.checkpoints import STAGING_FOLDER, find_checkpoints
from tests.launch import REPOSITORY, SECONDS
from tests.runs import assert_same_bits, do_run, files_of_at_most, losses, write_config

pytestmark = pytest.mark.fault(by_default=True)

NAMESPACE = ["unshare", "--user", "--mount", "--map-root-user"]
OTHER_SIZES = (30, 130, 180, 230, 310, 520, 640, 800)  # a checkpoint takes some 120 kB, so each fails at another file
EVERY_STEP: dict[str, Any] = {"save_steps": 1, "max_steps": 6}


@pytest.fixture
def can_mount() -> None:
    """Skip where the system lets nobody mount in a namespace of their own."""
    if sys.platform != "linux" or subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare cannot make a mount namespace here")


def run_on(
    chat_folder: Path, mount: str, *, meanwhile: str = "", stdout: str = "/dev/stdout", **settings: Any
) -> tuple[int, str, Path]:
    """Do a run whose output folder is mounted by `mount`; return exit code, what was said, and a copy of the output.

    Args:
        chat_folder: that of the fixture.
        mount: shell commands; `$OUTPUT` is the output folder.
        meanwhile: shell commands that are carried out while the run `$RUN` goes on.
        stdout: where the run's stdout goes.
        settings: those of `write_config`.
    """
    output, kept = chat_folder / "output", chat_folder / "kept"
    config = write_config(output, **EVERY_STEP | settings)
    output.mkdir()
    command = [sys.executable, "finetune.py", str(chat_folder / "data"), str(chat_folder / "model"), str(config)]
    shell = f"{mount}\n{shlex.join(command)} > {stdout} &\nRUN=$!\n{meanwhile}\nwait $RUN; code=$?\n"
    shell += f"cp -a $OUTPUT {shlex.quote(str(kept))}; exit $code"
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", shell],
        env=os.environ | {"OUTPUT": str(output)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    output.rmdir()  # empty: what was written lay on the mounted disk
    kept.rename(output)
    return done.returncode, done.stdout + done.stderr, output


@pytest.mark.usefixtures("can_mount")
@pytest.mark.parametrize(
    "kilobytes",
    [400, *(pytest.param(size, marks=pytest.mark.fault) for size in (30, 130, 180, 230, 310, 520, 640, 800))],
)
def test_a_disk_that_becomes_full_ends_the_run_and_costs_no_checkpoint(chat_folder: Path, kilobytes: int) -> None:
    """One line says why and how to go on; with room, the run ends as one that always had it, bit for bit."""
    code, said, output = run_on(chat_folder, f"mount -t tmpfs -o size={kilobytes}k tmpfs $OUTPUT")
    checkpoints = find_checkpoints(output)
    assert [found.defect for found in checkpoints] == [""] * len(checkpoints)
    assert code == 1, said
    assert "Traceback" not in said
    assert f"stopped: {output}: the disk is full (" in said
    assert "make room, or lower training_args.save_total_limit" in said
    last = f"{checkpoints[-1].path} is whole, and the same command" if checkpoints else "no checkpoint was written yet"
    assert said.count(last) == 1, said
    assert not (output / STAGING_FOLDER).exists()
    do_run(output, chat_folder / "data", chat_folder / "model", resume="yes", **EVERY_STEP)
    whole = do_run(chat_folder / "whole", chat_folder / "data", chat_folder / "model", **EVERY_STEP)
    assert_same_bits(output, whole)
    assert sorted(losses(output))[-1] == 6


@pytest.mark.usefixtures("can_mount")
@pytest.mark.parametrize("kilobytes", [180, *(pytest.param(size, marks=pytest.mark.fault) for size in (150, 210, 240))])
def test_a_disk_that_becomes_full_of_the_final_model_costs_no_checkpoint(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], kilobytes: int
) -> None:
    """R1: the root holds nothing of it; with room, `yes` saves the model of the last checkpoint."""
    settings: dict[str, Any] = {"save_steps": 6}
    code, said, output = run_on(chat_folder, f"mount -t tmpfs -o size={kilobytes}k tmpfs $OUTPUT", **settings)
    last = output / "checkpoint-6"
    assert code == 1, said
    assert f"stopped: {output}: the disk is full (" in said
    assert said.count(f"{last} is whole, and the same command with `yes` as RESUME goes on from it") == 1, said
    assert [(found.path, found.defect) for found in find_checkpoints(output)] == [(last, "")]
    left = {path.name for path in output.iterdir()} - {"loss.png"}
    assert left == {"checkpoint-6", "metrics.jsonl", "run.json"}
    capsys.readouterr()
    do_run(output, chat_folder / "data", chat_folder / "model", resume="yes", **EVERY_STEP | settings)
    assert f"{last} has all steps behind it: nothing is trained" in capsys.readouterr().err
    assert_same_bits(output, last)


@pytest.mark.usefixtures("can_mount")
def test_an_output_folder_that_can_only_be_read_is_refused(chat_folder: Path) -> None:
    """Before the model is loaded, with what to write."""
    mount = "mount -t tmpfs tmpfs $OUTPUT && mount -o remount,ro $OUTPUT"
    code, said, _ = run_on(chat_folder, mount)
    assert code == 2
    assert "training_args.output_dir: " in said
    assert "cannot be made or written to\n    -> name a folder of yours" in said


TURN_READ_ONLY = """
until [ -e $OUTPUT/checkpoint-3 ]; do kill -0 $RUN || exit; sleep 0.05; done
until mount -o remount,ro $OUTPUT 2> /dev/null; do kill -0 $RUN || exit; done  # refused while a file is being written
"""


@pytest.mark.usefixtures("can_mount")
def test_a_disk_that_can_only_be_read_from_some_moment_on_ends_the_run_and_costs_no_checkpoint(
    chat_folder: Path,
) -> None:
    """As a disk with errors is mounted again; once it can be written to, the run ends as one that always could."""
    settings: dict[str, Any] = {"save_steps": 3, "save_total_limit": 2, "lr_scheduler_type": "constant"}
    endless = settings | {"max_steps": 1_000_000}
    code, said, output = run_on(chat_folder, "mount -t tmpfs tmpfs $OUTPUT", meanwhile=TURN_READ_ONLY, **endless)
    assert code == 1, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("stopped: ")]
    (*_, last) = find_checkpoints(output)
    assert last.defect == ""
    assert line.startswith(f"stopped: {output}: the disk can only be read (")
    assert line.endswith(
        f": mount it for writing; {last.path} is whole, and the same command with `yes` as RESUME goes on from it"
    )
    settings["max_steps"] = last.step + 4
    do_run(output, chat_folder / "data", chat_folder / "model", resume="yes", **settings)
    whole = do_run(chat_folder / "whole", chat_folder / "data", chat_folder / "model", **settings)
    assert_same_bits(output, whole)
    assert losses(output) == losses(whole)
    assert not (output / STAGING_FOLDER).exists()


@pytest.mark.fault
def test_a_program_behind_a_pipe_that_ends_costs_nothing(chat_folder: Path) -> None:
    """As with `| head -1`: what nobody reads any more is dropped, and the run goes on to its end."""
    output = chat_folder / "output"
    config = write_config(output, **EVERY_STEP)
    command = [sys.executable, "finetune.py", str(chat_folder / "data"), str(chat_folder / "model"), str(config)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 0, said
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("can_mount")
def test_a_full_disk_behind_the_printed_lines_costs_nothing(chat_folder: Path) -> None:
    """As where `> run.log` fills the disk: /dev/full refuses every byte."""
    code, said, output = run_on(chat_folder, "mount -t tmpfs tmpfs $OUTPUT", stdout="/dev/full")
    assert (code, said.count("Traceback")) == (0, 0), said
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6]


def test_what_is_printed_to_a_full_disk_is_dropped() -> None:
    """Also what is still in a buffer at the end, which would change the exit code."""
    program = (
        "from glm_edge_ft.console import prepare_streams, show\nprepare_streams()\nshow('x' * 100_000)\nprint('y')"
    )
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, cwd=REPOSITORY, check=False)
    assert done.returncode == 0


def test_a_limit_of_the_size_of_files_is_named(chat_folder: Path) -> None:
    """The model of 0.5 MB cannot be written; nothing of it stays."""
    with files_of_at_most(100_000), pytest.raises(RunStopped) as caught:
        do_run(chat_folder / "output", chat_folder / "data", chat_folder / "model", peft=None, **EVERY_STEP)
    said = str(caught.value)
    assert "a file may not become so large (ulimit -f)" in said
    assert said.endswith("no checkpoint was written yet, so the same command starts from the beginning")
    assert find_checkpoints(chat_folder / "output") == []
    assert not (chat_folder / "output" / STAGING_FOLDER).exists()


def test_clock_and_names_of_folders_do_not_decide_what_is_newest(
    chat_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clock that was moved back between two checkpoints, and a folder that was renamed since."""
    shared: dict[str, Any] = {"save_steps": 2, "save_total_limit": 2}
    output = do_run(chat_folder / "output", chat_folder / "data", chat_folder / "model", max_steps=4, **shared)
    os.utime(output / "checkpoint-2", (2e9, 2e9))
    os.utime(output / "checkpoint-4", (1e9, 1e9))
    moved = output.rename(chat_folder / "moved")
    shutil.move(chat_folder / "model", chat_folder / "renamed")
    capsys.readouterr()
    do_run(moved, chat_folder / "data", chat_folder / "renamed", resume="yes", max_steps=8, **shared)
    said = capsys.readouterr().err
    assert f"continuing from {moved / 'checkpoint-4'}" in said
    assert f"MODEL {chat_folder / 'model'} -> {chat_folder / 'renamed'}: the same weights under another name" in said
    assert [found.step for found in find_checkpoints(moved)] == [6, 8]
