"""An output folder read back: what its run logged, recorded and predicted, and what of that is missing."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge_ft.errors import UserError
from glm_edge_ft.training.checkpoints import METRICS_FILE, PREDICTIONS_FOLDER, RUN_RECORD
from glm_edge_ft.training.curves import Points, iter_metrics, read_points
from glm_edge_ft.training.metrics import METRIC_NAMES

SECRETS = ("hub_token", "push_to_hub_token")
"""Training arguments that may hold a password, which no page for others may show."""

_OF_TRAINING = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes")
CURVES = (*_OF_TRAINING, "eval_loss", *(f"eval_{name}" for name in METRIC_NAMES))
"""What the page draws over the steps."""
MAXIMUM_EVALUATIONS = 1000

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Note:
    """Something the page says about what it lacks.

    Attributes:
        key: the sentence, among the labels of `page.js`.
        values: what stands in its places `{0}`, `{1}`.
    """

    key: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class PredictionFile:
    """One file of `predictions/`.

    Attributes:
        name: its name without the suffix, such as `eval-120`.
        rows: its lines in their order: prompt, reference, prediction and scores, as evaluation wrote them.
    """

    name: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class RunFolder:
    """What an output folder holds.

    Attributes:
        folder: the folder as it was named.
        curves: the points of `metrics.jsonl`, by the keys that training logs over its steps.
        log_lines: its lines that are no step of training: evaluations, and the end of the run.
        record: `run.json`; empty where there is none.
        predictions: the files of `predictions/`, by the step they were written at.
        notes: what is missing or could not be read.
    """

    folder: Path
    curves: dict[str, Points]
    log_lines: Sequence[dict[str, Any]]
    record: dict[str, Any]
    predictions: tuple[PredictionFile, ...]
    notes: tuple[Note, ...]


def read_run(folder: Path) -> RunFolder:
    """Return what is in an output folder, also of a run that is still going or was killed.

    Raises UserError where the folder has nothing of a run, with what was looked for.
    """
    _refuse_other_folders(folder)
    notes: list[Note] = []
    record = _read_record(folder / RUN_RECORD, notes)
    curves, log_lines = _read_log(folder / METRICS_FILE, notes)
    if (record or "loss" in curves) and not any("train_runtime" in line for line in log_lines):
        last = int(max((steps[-1] for steps, _ in curves.values()), default=0))
        planned = _as_dict(_as_dict(record.get("config")).get("training_args")).get("max_steps")
        is_known = isinstance(planned, int) and planned > 0
        notes.append(Note("unfinished", (f"{last} / {planned}" if is_known else str(last),)))
    predictions = _read_predictions(folder / PREDICTIONS_FOLDER, notes)
    return RunFolder(folder, curves, log_lines, record, predictions, tuple(notes))


def _refuse_other_folders(folder: Path) -> None:
    where = f"OUTPUT_DIR {folder}"
    if not folder.exists():
        raise UserError.single(where, "there is no such folder", "name the output_dir of a run")
    if not folder.is_dir():
        raise UserError.single(where, "is a file", f"name the run's folder: {folder.parent}")
    if (folder / METRICS_FILE).is_file() or (folder / RUN_RECORD).is_file() or any(_files(folder / PREDICTIONS_FOLDER)):
        return
    what = f"is no output folder of a run: it has no {RUN_RECORD}, no {METRICS_FILE}, no {PREDICTIONS_FOLDER}/*.jsonl"
    is_checkpoint = _CHECKPOINT.fullmatch(folder.name)
    fix = f"name the folder of the whole run: {folder.parent}" if is_checkpoint else "name the output_dir of a run"
    raise UserError.single(where, what, fix)


def _read_record(path: Path, notes: list[Note]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(Note("no_record"))
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        notes.append(Note("bad_record"))
        return {}
    training = _as_dict(_as_dict(record.get("config")).get("training_args"))
    training |= {name: "***" for name in SECRETS if training.get(name)}
    overrides = record.get("overrides")
    record["overrides"] = [_hide_secret(str(text)) for text in overrides] if isinstance(overrides, list) else []
    return record


def _hide_secret(override: str) -> str:
    key, _, _ = override.partition("=")
    return f"{key}=***" if key.rpartition(".")[2] in SECRETS else override


def _read_log(path: Path, notes: list[Note]) -> tuple[dict[str, Points], list[dict[str, Any]]]:
    others: deque[dict[str, Any]] = deque(maxlen=MAXIMUM_EVALUATIONS)
    count = 0

    def every_line() -> Iterator[dict[str, Any]]:
        nonlocal count
        for line in iter_metrics(path):
            if "loss" not in line:
                others.append(line)
                count += 1
            yield line

    curves = read_points(every_line(), CURVES)
    if not curves and not others:
        notes.append(Note("no_metrics"))
    if count > len(others):
        notes.append(Note("evaluations_capped", (str(len(others)), str(count))))
    return curves, list(others)


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("*.jsonl")) if folder.is_dir() else []


def _read_predictions(folder: Path, notes: list[Note]) -> tuple[PredictionFile, ...]:
    files = sorted(_files(folder), key=lambda path: [*_number_last(path.stem)])
    read = []
    for path in files:
        rows, broken = [], 0
        *whole, torn = path.read_bytes().split(b"\n")  # the last one is empty, or just being written
        for line in [*whole, torn] if _parse(torn) else whole:
            if line.strip():
                row = _parse(line)
                rows += [row] if row is not None else []
                broken += row is None
        if broken:
            notes.append(Note("broken_lines", (f"{PREDICTIONS_FOLDER}/{path.name}", str(broken))))
        if rows:
            read.append(PredictionFile(path.stem, tuple(rows)))
    if not read:
        notes.append(Note("no_predictions"))
    return tuple(read)


def _number_last(stem: str) -> tuple[str, int]:
    """Return what orders `eval-40` before `eval-120`."""
    head, _, number = stem.rpartition("-")
    return (head, int(number)) if number.isdecimal() else (stem, 0)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line of predictions, or None for one that is torn or is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("reference"), str) and isinstance(row.get("prediction"), str)
    return row if whole else None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
