"""An output folder read back: what its run logged, recorded and predicted, and what of that is missing."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge_ft.errors import UserError
from glm_edge_ft.training.checkpoints import METRICS_FILE, PREDICTIONS_FOLDER, RUN_RECORD
from glm_edge_ft.training.curves import Points, iter_metrics, read_points
from glm_edge_ft.training.metrics import METRIC_NAMES

SECRETS = ("hub_token", "push_to_hub_token")
"""Training arguments that may hold a password, which no page for others may show."""
CURVES = (
    *("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "eval_loss"),
    *(f"eval_{name}" for name in METRIC_NAMES),
)
"""What the page draws over the steps."""
MAXIMUM_EVALUATIONS = 1000

Note = tuple[str, ...]
"""What the page says about something missing: the key of a label in `page.js`, then the values for its places."""


@dataclass(frozen=True)
class RunFolder:
    """The content of an output folder.

    Attributes:
        folder: as it was named.
        curves: the points of `metrics.jsonl`, by the keys that training logs over its steps.
        log_lines: its lines that are no step of training: evaluations, and the end of the run.
        record: `run.json`; empty where there is none.
        predictions: the rows of each file of `predictions/` by its name without suffix, `eval-40` before `eval-120`.
        notes: what is missing or could not be read.
    """

    folder: Path
    curves: dict[str, Points]
    log_lines: list[dict[str, Any]]
    record: dict[str, Any]
    predictions: dict[str, list[dict[str, Any]]]
    notes: list[Note]


def read_run(folder: Path) -> RunFolder:
    """Read an output folder, also of a run that is still going or was killed.

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
        notes.append(("unfinished", f"{last} / {planned}" if is_known else str(last)))
    predictions = _read_predictions(folder / PREDICTIONS_FOLDER, notes)
    return RunFolder(folder, curves, log_lines, record, predictions, notes)


def _refuse_other_folders(folder: Path) -> None:
    where, fix = f"OUTPUT_DIR {folder}", "name the output_dir of a run"
    if not folder.exists():
        raise UserError.single(where, "there is no such folder", fix)
    if not folder.is_dir():
        raise UserError.single(where, "is a file", f"name the run's folder: {folder.parent}")
    if (folder / METRICS_FILE).is_file() or (folder / RUN_RECORD).is_file():
        return
    if not any((folder / PREDICTIONS_FOLDER).glob("*.jsonl")):
        looked_for = f"no {RUN_RECORD}, no {METRICS_FILE}, no {PREDICTIONS_FOLDER}/*.jsonl"
        if folder.name.startswith("checkpoint-"):
            fix = f"name the folder of the whole run: {folder.parent}"
        raise UserError.single(where, f"is no output folder of a run: it has {looked_for}", fix)


def _read_record(path: Path, notes: list[Note]) -> dict[str, Any]:
    """Return `run.json` without passwords."""
    if not path.is_file():
        notes.append(("no_record",))
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        notes.append(("bad_record",))
        return {}
    training = _as_dict(_as_dict(record.get("config")).get("training_args"))
    training |= {name: "***" for name in SECRETS if training.get(name)}
    overrides = record.get("overrides")
    pairs = [str(text).partition("=") for text in overrides] if isinstance(overrides, list) else []
    record["overrides"] = [f"{key}=***" if key.endswith(SECRETS) else key + sign + value for key, sign, value in pairs]
    return record


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
        notes.append(("no_metrics",))
    if count > len(others):
        notes.append(("evaluations_capped", str(len(others)), str(count)))
    return curves, list(others)


def _read_predictions(folder: Path, notes: list[Note]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=_number_last):
        *lines, torn = path.read_bytes().split(b"\n")  # the last one is empty, or just being written
        rows = [_parse(line) for line in lines if line.strip()]
        whole = [row for row in (*rows, _parse(torn)) if row is not None]
        if broken := rows.count(None):
            notes.append(("broken_lines", f"{PREDICTIONS_FOLDER}/{path.name}", str(broken)))
        if whole:
            found[path.stem] = whole
    if not found:
        notes.append(("no_predictions",))
    return found


def _number_last(path: Path) -> tuple[str, int]:
    head, _, number = path.stem.rpartition("-")
    return (head, int(number)) if number.isdecimal() else (path.stem, 0)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line of predictions, or None for one that is torn or is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("reference"), str) and isinstance(row.get("prediction"), str)
    return row if is_row else None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
