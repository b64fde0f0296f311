"""Checkpoints: which of them are whole, what RESUME means, how one is written.

A checkpoint is whole or invisible: it is written under `.saving/`, closed with a manifest of its files and their
sizes, flushed to disk, looked through, and only then renamed to `checkpoint-N`. This module needs the standard library
alone, so RESUME is checked before anything heavy is imported.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glm_edge_ft.errors import RunStopped, UserError
from glm_edge_ft.files import flush_to_disk, flush_tree, sizes_of_files, write_text_atomically

MANIFEST = "manifest.json"
RUN_RECORD = "run.json"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
PREDICTIONS_FOLDER = "predictions"
STAGING_FOLDER = ".saving"
STATE_FILE = "trainer_state.json"
ENCODER_FILE = "prefix_encoder.safetensors"
RANDOM_STATE_PREFIX = "rng_state"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHT_FILES = (
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class CheckpointFolder:
    """One `checkpoint-N` on disk.

    Attributes:
        step: N.
        defect: why it is not whole, or "" when it is.
    """

    step: int
    path: Path
    defect: str


@dataclass(frozen=True)
class ResumePlan:
    """What RESUME came to.

    Attributes:
        path: the checkpoint to continue from, or None for a fresh start.
        notice: a line for the user, or "".
    """

    path: Path | None
    notice: str = ""


def find_checkpoints(output_dir: Path) -> list[CheckpointFolder]:
    """Return the checkpoints in `output_dir`, lowest step first, each with its defect if it has one."""
    return [CheckpointFolder(step, path, find_defect(path)) for step, path in _numbered_folders(output_dir)]


def how_to_go_on(output_dir: Path, on_all_machines: bool = False) -> str:
    """Return from which checkpoint a run that ended can be continued, as the end of a sentence."""
    command = "the same command, on all machines," if on_all_machines else "the same command"
    whole = [found.path for found in find_checkpoints(output_dir) if not found.defect]
    if not whole:
        return f"no checkpoint was written yet, so {command} starts from the beginning"
    return f"{whole[-1]} is whole, and {command} with `yes` as RESUME goes on from it"


def _numbered_folders(output_dir: Path) -> list[tuple[int, Path]]:
    """Return step and path of each `checkpoint-N`, lowest step first; times do not count, they may be anything."""
    entries = output_dir.iterdir() if output_dir.is_dir() else ()
    matches = [(_CHECKPOINT_NAME.fullmatch(entry.name), entry) for entry in entries]
    return sorted((int(match.group(1)), entry) for match, entry in matches if match and entry.is_dir())


def find_defect(folder: Path) -> str:
    """Return why `folder` cannot be resumed from, or "" when it is whole.

    State, optimizer, scheduler and weights must be there, none empty; with a manifest, each with its size. The
    random state is not asked for: without it a run goes on and says that it is not bit-exact.
    """
    if defect := find_broken_file(folder):
        return defect
    if not any(folder.glob("global_step*")):  # DeepSpeed keeps optimizer and scheduler in there
        for name in ("optimizer.pt", "scheduler.pt"):  # not there under save_only_model: nothing to continue from
            if defect := _size_defect(folder, name, None):
                return defect
    return _state_defect(folder / STATE_FILE)


def find_broken_file(folder: Path) -> str:
    """Return what is missing, empty or of another size than the manifest and each weight file's header say, or ""."""
    expected: dict[str, int] = {}
    if (folder / MANIFEST).is_file():
        try:
            sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            expected = {str(name): size for name, size in sizes.items() if not name.startswith(RANDOM_STATE_PREFIX)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} cannot be read"
    if not expected and not any((folder / name).is_file() for name in _WEIGHT_FILES):
        return "its weights are missing"
    return _size_defect(folder, STATE_FILE, expected.get(STATE_FILE)) or find_cut_file(folder, expected)


def find_cut_file(folder: Path, expected: Mapping[str, int]) -> str:
    """Return what is missing or of another size than `expected`, or than each weight file's own header says, or ""."""
    for name, size in expected.items():
        if defect := _size_defect(folder, name, size):
            return defect
    for path in sorted(folder.glob("*.safetensors")):
        if defect := _safetensors_defect(path):
            return defect
    return ""


def _size_defect(folder: Path, name: str, expected: int | None) -> str:
    """Compare a file's size with what the manifest says; None: it says nothing, and an empty file is none."""
    if not (folder / name).is_file():
        return f"{name} is missing"
    size = (folder / name).stat().st_size
    if size == 0 and expected != 0:
        return f"{name} is empty"
    if expected is not None and size != expected:
        return f"{name} has {size} bytes instead of {expected}"
    return ""


def _state_defect(path: Path) -> str:
    """Compare the step in the state with the folder's number."""
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} cannot be read"
    number = path.parent.name.rpartition("-")[2]
    return "" if str(step) == number else f"its state says step {step}: was the folder renamed?"


def _safetensors_defect(path: Path) -> str:
    """Compare the file's size with what its own header announces (format: 8-byte length, JSON header, data)."""
    try:
        with path.open("rb") as file:
            header_size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(header_size))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError, OverflowError):
        return f"{path.name} has a broken header"
    expected = 8 + header_size + end
    actual = path.stat().st_size
    return "" if actual == expected else f"{path.name} has {actual} bytes instead of {expected}"


def read_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps that a whole checkpoint has behind it."""
    return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])


def resolve_resume(resume: str | None, output_dir: Path) -> ResumePlan:
    """Turn the RESUME argument into a plan.

    `yes` takes the newest whole checkpoint and says which newer ones were passed over; with none it is a fresh start
    with a notice. A number takes that checkpoint. `no`, or nothing, is a fresh start. Raises UserError for a number
    that is not there or not whole, with the list of whole ones, and for any other word.
    """
    word = (resume or "").strip().lower()
    if word in ("", "no", "n", "false"):
        return ResumePlan(None)
    checkpoints = find_checkpoints(output_dir)
    if word in ("yes", "y", "true"):
        return _newest_whole(checkpoints, output_dir)
    match = re.fullmatch(r"(?:checkpoint-)?(\d+)", word)
    if match is None:
        raise UserError.single(
            f"RESUME {resume}", "is neither yes, no nor a checkpoint number", "write yes, no or e.g. 600"
        )
    wanted = int(match.group(1))
    for checkpoint in checkpoints:
        if checkpoint.step == wanted and not checkpoint.defect:
            return ResumePlan(checkpoint.path, f"continuing from {checkpoint.path}")
        if checkpoint.step == wanted:
            raise UserError.single(
                f"RESUME {resume}", f"{checkpoint.path} is not whole: {checkpoint.defect}", _whole_ones(checkpoints)
            )
    raise UserError.single(
        f"RESUME {resume}", f"there is no checkpoint-{wanted} in {output_dir}", _whole_ones(checkpoints)
    )


def _newest_whole(checkpoints: list[CheckpointFolder], output_dir: Path) -> ResumePlan:
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints):
        if not checkpoint.defect:
            skipped = "".join(f"; passed over {name}" for name in passed_over)
            return ResumePlan(checkpoint.path, f"continuing from {checkpoint.path}{skipped}")
        passed_over.append(f"{checkpoint.path.name} ({checkpoint.defect})")
    if passed_over:
        return ResumePlan(
            None, f"no checkpoint in {output_dir} is whole ({', '.join(passed_over)}): starting from the beginning"
        )
    earlier = [str(path.parent) for path in sorted(output_dir.glob(f"{EARLIER_FOLDER}/*/checkpoint-*"))]
    aside = f" (an earlier run's lie in {earlier[-1]})" if earlier else ""
    return ResumePlan(None, f"there is no checkpoint in {output_dir} yet{aside}: starting from the beginning")


def _whole_ones(checkpoints: list[CheckpointFolder]) -> str:
    steps = [str(checkpoint.step) for checkpoint in checkpoints if not checkpoint.defect]
    return (
        f"whole checkpoints: {', '.join(steps)}"
        if steps
        else "there is no whole checkpoint; leave RESUME out to start afresh"
    )


def staging_folder(output_dir: Path) -> Path:
    """Return the folder under which a checkpoint, or the final model, is written until it is whole."""
    return output_dir / STAGING_FOLDER


def remove_unfinished(output_dir: Path) -> None:
    """Remove what a run that was killed while it saved left half written."""
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)


def publish(staged: Path, output_dir: Path) -> Path:
    """Close the checkpoint at `staged` with its manifest and move it to `output_dir`; return its final path.

    A checkpoint of the same step that is already there, from a run that was resumed before it, is replaced. Raises
    RunStopped where a file is not what was written, as some full or failing disks leave it without an error.
    """
    files = sizes_of_files(staged)
    flush_tree(staged)
    write_text_atomically(staged / MANIFEST, json.dumps({"files": files}, indent=1))
    flush_to_disk(staged)
    if defect := find_broken_file(staged):
        raise RunStopped(f"{staged.name} could not be written whole ({defect}): is the disk full, or failing?")
    final = output_dir / staged.name
    if final.exists():
        _put_out_of_sight(final, staged.parent)
    staged.rename(final)
    flush_to_disk(output_dir)
    shutil.rmtree(staged.parent, ignore_errors=True)
    return final


def remove_old_checkpoints(output_dir: Path, limit: int | None, best_step: int | None) -> None:
    """Keep the newest `limit` checkpoints that are whole, the best one among them, and remove older ones.

    The newest whole one is always kept, broken ones count for nothing, and those older than it go too. Each is renamed
    before it is emptied, so that a process killed meanwhile leaves no half of it behind.

    Args:
        output_dir: the run's folder.
        limit: `save_total_limit`; None or less than 1: all are kept.
        best_step: step of the best checkpoint, which `load_best_model_at_end` needs at the end; None: there is none.
    """
    if limit is None or limit < 1:
        return
    found = [(step, path, not find_broken_file(path)) for step, path in _numbered_folders(output_dir)]
    whole = [step for step, _, is_whole in found if is_whole]
    if not whole:
        return
    newest = whole[-1]
    others = [step for step in reversed(whole) if step not in (newest, best_step)]
    protected = {newest} | ({best_step} & set(whole))
    kept = protected | set(others[: max(0, limit - len(protected))])
    for step, path, is_whole in found:
        if step < newest and not (is_whole and step in kept):
            _put_out_of_sight(path, staging_folder(output_dir))
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)


def _put_out_of_sight(checkpoint: Path, staging: Path) -> None:
    """Make a checkpoint invisible in one go; it is gone once the staging folder is removed."""
    staging.mkdir(exist_ok=True)
    removed = staging / f"removed-{checkpoint.name}"
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)


RUN_FILES = ("checkpoint-*", PREDICTIONS_FOLDER, METRICS_FILE, CURVE_FILE)
"""What a run leaves in its output folder besides the final model and its record."""

FINAL_MODEL_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)
EARLIER_FOLDER = "earlier"


def set_aside_earlier_run(output_dir: Path) -> Path | None:
    """Move an earlier run's files into `earlier/N` of its folder, so that a fresh start writes over nothing.

    Returns that folder, or None when no run was there. The final model is moved only where `run.json` shows that it
    is a run's: another file of the same name in a folder that the user chose is left alone. The record itself goes
    last, so that a start that is killed meanwhile is followed by one that moves the rest.
    """
    has_record = (output_dir / RUN_RECORD).is_file()
    if not has_record and not find_checkpoints(output_dir):
        return None
    patterns = RUN_FILES + ((*FINAL_MODEL_FILES, RUN_RECORD) if has_record else ())
    return move_aside(output_dir, [path for pattern in patterns for path in output_dir.glob(pattern)])


def set_aside(output_dir: Path, resumed_from: Path) -> Path | None:
    """Move whole checkpoints later than the one resumed from into `earlier/N`: their line is given up."""
    step = read_step(resumed_from)
    later = [found.path for found in find_checkpoints(output_dir) if found.step > step and not found.defect]
    return move_aside(output_dir, later) if later else None


def move_aside(output_dir: Path, paths: list[Path]) -> Path:
    """Move files of `output_dir` into the next free `earlier/N` of it, and return that folder."""
    number = 1
    while (output_dir / EARLIER_FOLDER / str(number)).exists():
        number += 1
    folder = output_dir / EARLIER_FOLDER / str(number)
    folder.mkdir(parents=True)
    for path in paths:
        path.rename(folder / path.name)
    return folder
