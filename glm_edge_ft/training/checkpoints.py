"""Checkpoints and the final model: which are whole, which one RESUME means, how they are written.

A checkpoint is whole or invisible: it is written under `.saving/`, closed with a manifest of its files and their
sizes, flushed to disk, checked, and only then renamed to `checkpoint-N`. The final model goes the same way into the
root of the output folder. Nothing heavy is imported here, since RESUME is checked before torch is imported.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from glm_edge_ft.errors import RunStopped, UserError
from glm_edge_ft.files import flush_to_disk, flush_tree, sizes_of_files, write_text_atomically

MANIFEST = "manifest.json"
RUN_RECORD = "run.json"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
PREDICTIONS_FOLDER = "predictions"
STAGING_FOLDER = ".saving"
FINAL_FOLDER = "final-model"
EARLIER_FOLDER = "earlier"
STATE_FILE = "trainer_state.json"
ENCODER_FILE = "prefix_encoder.safetensors"
RANDOM_STATE_PREFIX = "rng_state"

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
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHT_FILES = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class CheckpointFolder:
    """One `checkpoint-N` on disk, and why no run can resume from it ("" when it is whole)."""

    step: int
    path: Path
    defect: str


@dataclass(frozen=True)
class ResumePlan:
    """The checkpoint to resume from, None for a fresh start; and a line for the user, or ""."""

    path: Path | None
    notice: str = ""


def find_checkpoints(output_dir: Path) -> list[CheckpointFolder]:
    """Return the checkpoints in `output_dir`, lowest step first, each with its defect if it has one."""
    return [CheckpointFolder(step, path, find_defect(path)) for step, path in _numbered_folders(output_dir)]


def _numbered_folders(output_dir: Path) -> list[tuple[int, Path]]:
    entries = output_dir.iterdir() if output_dir.is_dir() else ()
    matches = [(_CHECKPOINT_NAME.fullmatch(entry.name), entry) for entry in entries]
    return sorted((int(match.group(1)), entry) for match, entry in matches if match and entry.is_dir())


def how_to_go_on(output_dir: Path, on_all_machines: bool = False) -> str:
    """Return from which checkpoint a run that ended can be resumed, as the end of a sentence."""
    command = "the same command, on all machines," if on_all_machines else "the same command"
    whole = [found.path for found in find_checkpoints(output_dir) if not found.defect]
    if not whole:
        return f"no checkpoint was written yet, so {command} starts from the beginning"
    return f"{whole[-1]} is whole, and {command} with `yes` as RESUME goes on from it"


def find_defect(folder: Path, to_resume: bool = True) -> str:
    """Return what is missing, empty, cut or unreadable in a checkpoint, or "" when it is whole.

    The random state may be missing: a run resumes without it, and says that it is not bit-exact. To resume, optimizer
    and scheduler are needed as well, which `save_only_model` leaves out and DeepSpeed keeps in `global_step*`.
    """
    expected: dict[str, int | None] = {STATE_FILE: None}
    if (folder / MANIFEST).is_file():
        try:
            sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} cannot be read"
        expected |= {name: size for name, size in sizes if not name.startswith(RANDOM_STATE_PREFIX)}
    elif not any((folder / name).is_file() for name in _WEIGHT_FILES):
        return "its weights are missing"
    if to_resume and not any(folder.glob("global_step*")):
        for name in ("optimizer.pt", "scheduler.pt"):
            expected.setdefault(name, None)
    if (defect := _find_broken_file(folder, expected)) or not to_resume:
        return defect
    try:
        step = read_step(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE_FILE} cannot be read"
    return "" if folder.name == f"checkpoint-{step}" else f"its state says step {step}: was the folder renamed?"


def _find_broken_file(folder: Path, expected: Mapping[str, int | None]) -> str:
    """Return what is missing or of another size than expected (None: any but 0), or is no whole safetensors file."""
    for name, size in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        actual = (folder / name).stat().st_size
        if actual == 0 and size != 0:
            return f"{name} is empty"
        if size is not None and actual != size:
            return f"{name} has {actual} bytes instead of {size}"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} is cut or damaged: {error}"
    return ""


def read_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps that a whole checkpoint has behind it."""
    return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])


def resolve_resume(resume: str | None, output_dir: Path) -> ResumePlan:
    """Turn the RESUME argument into a plan.

    `yes` takes the newest whole checkpoint, or a fresh start, and says so; a number takes that checkpoint; `no`, or
    nothing, is a fresh start. Raises UserError for any other word and for a checkpoint that is missing or not whole.
    """
    word, where = (resume or "").strip().lower(), f"RESUME {resume}"
    if word in ("", "no", "n", "false"):
        return ResumePlan(None)
    checkpoints = find_checkpoints(output_dir)
    if word in ("yes", "y", "true"):
        return _newest_whole(checkpoints, output_dir)
    match = re.fullmatch(r"(?:checkpoint-)?(\d+)", word)
    if match is None:
        raise UserError.single(where, "is neither yes, no nor a checkpoint number", "write yes, no or e.g. 600")
    wanted = next((found for found in checkpoints if found.step == int(match.group(1))), None)
    if wanted is not None and not wanted.defect:
        return ResumePlan(wanted.path, f"continuing from {wanted.path}")
    absent = f"there is no checkpoint-{int(match.group(1))} in {output_dir}"
    whole = ", ".join(str(found.step) for found in checkpoints if not found.defect)
    fix = f"whole checkpoints: {whole}" if whole else "there is no whole checkpoint; leave RESUME out to start afresh"
    raise UserError.single(where, f"{wanted.path} is not whole: {wanted.defect}" if wanted else absent, fix)


def _newest_whole(checkpoints: list[CheckpointFolder], output_dir: Path) -> ResumePlan:
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints):
        if not checkpoint.defect:
            skipped = "".join(f"; passed over {name}" for name in passed_over)
            return ResumePlan(checkpoint.path, f"continuing from {checkpoint.path}{skipped}")
        passed_over.append(f"{checkpoint.path.name} ({checkpoint.defect})")
    if passed_over:
        what = f"no checkpoint in {output_dir} is whole ({', '.join(passed_over)})"
    else:
        earlier = [str(path.parent) for path in sorted(output_dir.glob(f"{EARLIER_FOLDER}/*/checkpoint-*"))]
        aside = f" (those of an earlier run are in {earlier[-1]})" if earlier else ""
        what = f"there is no checkpoint in {output_dir} yet{aside}"
    return ResumePlan(None, f"{what}: starting from the beginning")


def staging_folder(output_dir: Path) -> Path:
    """Return the folder in which a checkpoint, or the final model, is written until it is whole."""
    return output_dir / STAGING_FOLDER


def remove_unfinished(output_dir: Path) -> None:
    """Remove what a run that was killed while saving left behind."""
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)


def publish(staged: Path, output_dir: Path) -> Path:
    """Write the manifest of the checkpoint at `staged` and move it to `output_dir`; return its final path.

    It replaces a checkpoint of the same step, left by a run that was resumed from before it. Raises RunStopped where a
    file is not what was written, as some full or failing disks leave it without an error.
    """
    sizes = sizes_of_files(staged)
    flush_tree(staged)
    write_text_atomically(staged / MANIFEST, json.dumps({"files": sizes}, indent=1))
    flush_to_disk(staged)
    _stop_at(find_defect(staged, to_resume=False), staged.name)
    final = output_dir / staged.name
    if final.exists():
        _hide(final, staged.parent)
    staged.rename(final)
    flush_to_disk(output_dir)
    remove_unfinished(output_dir)
    return final


def _stop_at(defect: str, name: str) -> None:
    if defect:
        raise RunStopped(f"{name} could not be written whole ({defect}): is the disk full, or failing?")


def _hide(checkpoint: Path, staging: Path) -> None:
    """Make a checkpoint invisible with one rename; it is gone once the staging folder is removed."""
    staging.mkdir(exist_ok=True)
    hidden = staging / f"removed-{checkpoint.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)


def remove_old_checkpoints(output_dir: Path, limit: int | None, best_step: int | None) -> None:
    """Keep the newest `limit` whole checkpoints, the newest and the best always, and remove all older ones.

    Each is renamed before its files are removed, so that a process killed meanwhile leaves no half of it behind.

    Args:
        output_dir: the run's folder.
        limit: `save_total_limit`; None or less than 1: all are kept.
        best_step: step of the best checkpoint, which `load_best_model_at_end` needs at the end; None: there is none.
    """
    found = [(step, path, not find_defect(path, to_resume=False)) for step, path in _numbered_folders(output_dir)]
    whole = [step for step, _, is_whole in found if is_whole]
    if not whole or limit is None or limit < 1:
        return
    protected = {whole[-1]} | ({best_step} & set(whole))
    others = [step for step in reversed(whole) if step not in protected]
    kept = protected | set(others[: max(0, limit - len(protected))])
    for step, path, is_whole in found:
        if step < whole[-1] and not (is_whole and step in kept):
            _hide(path, staging_folder(output_dir))
    remove_unfinished(output_dir)


def publish_final_model(staged: Path, output_dir: Path) -> None:
    """Move the final model from `staged` into the root of `output_dir`, so that no reader takes a torn one for whole.

    The root holds other files, so no single rename can do it. But every reader begins with `config.json` or
    `adapter_config.json`: an earlier model's goes first, then weights, index and tokenizer change and shards that the
    new model has no use for go, and the new config comes last. Each part is on disk before the next one begins. A
    process that is killed on the way leaves the earlier model, none, or the new one.

    Raises:
        RunStopped: a file is not what was written; the root is then unchanged.
    """
    sizes = sizes_of_files(staged)
    flush_tree(staged)
    entries = [name for name in sizes if name in ("adapter_config.json", "config.json")]
    no_entry = "" if entries else "there is neither adapter_config.json nor config.json"
    _stop_at(_find_broken_file(staged, sizes) or no_entry, "the final model")
    for name in entries:
        (output_dir / name).unlink(missing_ok=True)
    flush_to_disk(output_dir)
    for name in [name for name in sizes if name not in entries]:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(output_dir / name)
    for path in (*output_dir.glob("model*.safetensors"), output_dir / "model.safetensors.index.json"):
        if path.name not in sizes:
            path.unlink(missing_ok=True)
    flush_to_disk(output_dir)
    for name in entries:
        (staged / name).replace(output_dir / name)
    flush_to_disk(output_dir)
    remove_unfinished(output_dir)


def set_aside_earlier_run(output_dir: Path) -> Path | None:
    """Move an earlier run's files into `earlier/N` of its folder, so that a fresh start overwrites nothing.

    Returns that folder, or None when there was no run. Only where `run.json` shows that the final model is a run's is
    it moved: a user's own files of the same names stay. The record goes last, so that a start which is killed meanwhile
    is followed by one that moves the rest.
    """
    has_record = (output_dir / RUN_RECORD).is_file()
    if not has_record and not _numbered_folders(output_dir):
        return None
    patterns = RUN_FILES + ((*FINAL_MODEL_FILES, RUN_RECORD) if has_record else ())
    return move_aside(output_dir, [path for pattern in patterns for path in output_dir.glob(pattern)])


def set_aside(output_dir: Path, resumed_from: Path) -> Path | None:
    """Move whole checkpoints later than the one resumed from into `earlier/N`: the new run takes their place."""
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
