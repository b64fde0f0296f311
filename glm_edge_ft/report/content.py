"""What the page's script draws from: curves, evaluations and predictions as JSON-able data, capped in size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_edge_ft.errors import UserError
from glm_edge_ft.report.reading import RunFolder
from glm_edge_ft.training.curves import is_number
from glm_edge_ft.training.metrics import METRIC_NAMES

MAXIMUM_ROWS = 1000
"""Rows of one predictions file: of more, the best and the worst halves are kept."""
MAXIMUM_ROWS_IN_ALL = 8000
"""Rows of the page: with more files than fit with MAXIMUM_ROWS each, every file gets fewer of them."""
MINIMUM_ROWS = 50
MAXIMUM_DEPTH = 50
"""Levels of lists and objects that the page shows of `run.json`."""
MAXIMUM_CHARACTERS = 4000
MAXIMUM_IMAGES = 400
THUMBNAIL_PIXELS = 160
CAPPED_BY = "rouge-l"
_ABOUT_A_RUN = ("model", "data_dir", "config_file", "overrides", "resumed_from", "config", "facts", "data", "versions")


def build_content(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the data of the page: `runs`, each with curves, evaluations and predictions, and what they share.

    Every number is finite or None. A row of predictions is
    `[place, prompt, reference, prediction, [scores in the order of "metrics"], [numbers in "images"]]`, the first four
    as numbers in "texts": each evaluation of a run repeats all prompts and references.
    """
    files = sum(len(run.predictions) for run in runs)
    maximum_rows = min(MAXIMUM_ROWS, max(MINIMUM_ROWS, MAXIMUM_ROWS_IN_ALL // max(files, 1)))
    texts, thumbnails = _Texts(), _Thumbnails()
    described = []
    for run, name in zip(runs, _names(runs), strict=True):
        notes = list(run.notes)
        shown = []
        for file, rows in run.predictions.items():
            kept = _best_and_worst(rows, maximum_rows)
            if len(kept) < len(rows):
                notes.append(("rows_capped", file, str(len(kept)), str(len(rows)), str(maximum_rows // 2)))
            shown.append({"name": file, "rows": [_describe_row(row, texts, thumbnails) for row in kept]})
        notes += thumbnails.take_notes()
        described.append(
            {
                "name": name,
                "folder": str(run.folder),
                "record": finite({key: run.record[key] for key in _ABOUT_A_RUN if key in run.record}),
                "curves": {key: list(zip(*points, strict=True)) for key, points in run.curves.items()},
                "evaluations": evaluations(run.log_lines),
                "ended": finite(next((line for line in reversed(run.log_lines) if "train_runtime" in line), None)),
                "files": shown,
                "notes": notes,
            }
        )
    return {"metrics": METRIC_NAMES, "runs": described, "texts": list(texts), "images": thumbnails.urls}


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell the runs apart; a folder named twice gets a number."""
    paths = [run.folder.resolve() for run in runs]
    names: list[str] = []
    for path in paths:
        deep = next((n for n in range(1, 4) if sum(p.parts[-n:] == path.parts[-n:] for p in paths) == 1), 1)
        name = "/".join(path.parts[-deep:])
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def evaluations(log_lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each evaluation: `set` (eval or test), `step`, the `model` where several were measured, and its scores."""
    found = []
    for line in log_lines:
        for prefix in ("eval", "test"):
            if f"{prefix}_loss" in line or f"{prefix}_{CAPPED_BY}" in line:
                numbers = {name: line.get(f"{prefix}_{name}") for name in ("loss", *METRIC_NAMES)}
                numbers["step"] = line.get("step")
                model = str(line["model"]) if line.get("model") is not None else None
                known = {name: value if is_number(value) else None for name, value in numbers.items()}
                found.append({"set": prefix, "model": model, **known})
    return found


def finite(value: Any, depth: int = MAXIMUM_DEPTH) -> Any:
    """Return JSON-able data with None for numbers that no float can hold and for what is nested too deeply."""
    if isinstance(value, dict) and depth:
        return {str(key): finite(part, depth - 1) for key, part in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [finite(part, depth - 1) for part in value]
    return value if isinstance(value, str | bool) or is_number(value) else None


def _best_and_worst(rows: list[dict[str, Any]], maximum: int) -> list[dict[str, Any]]:
    """Return at most so many rows, in their order."""
    if len(rows) <= maximum:
        return rows
    order = sorted(range(len(rows)), key=lambda index: _score(rows[index], CAPPED_BY) or 0.0)
    return [rows[index] for index in sorted(order[: maximum // 2] + order[-(maximum // 2) :])]


def _describe_row(row: dict[str, Any], texts: _Texts, thumbnails: _Thumbnails) -> list[Any]:
    place = ":".join(str(row[key]) for key in ("file", "line", "turn") if key in row)
    prompt = str(row.get("prompt") or "")
    prompt = prompt if len(prompt) <= MAXIMUM_CHARACTERS else "… " + prompt[-MAXIMUM_CHARACTERS:]
    images = row["images"] if isinstance(row.get("images"), list) else []
    numbers = [texts[text] for text in (place, prompt, _shorten(row["reference"]), _shorten(row["prediction"]))]
    scores = [_score(row, name) for name in METRIC_NAMES]
    return [*numbers, scores, [thumbnails.add(path) for path in images if isinstance(path, str)]]


def _score(row: dict[str, Any], name: str) -> float | None:
    value: Any = row.get(name)
    return round(value, 2) if is_number(value) else None


def _shorten(text: str) -> str:
    left = len(text) - MAXIMUM_CHARACTERS
    return text if left <= 0 else f"{text[:MAXIMUM_CHARACTERS]} … (+{left:,})"


class _Texts(dict[str, int]):
    """Numbers texts in the order in which they are first asked for."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))


class _Thumbnails:
    """Images as small JPEGs in `data:` URLs, each once."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.missing: set[str] = set()
        self.was_full = False
        self._numbers: dict[str, int | None] = {}

    def add(self, path: str) -> int | None:
        """Return the number of an image's URL; None where it cannot be read, or the page has enough images."""
        if path not in self._numbers:
            self._numbers[path] = self._make(path)
        elif self._numbers[path] is None and not self.was_full:
            self.missing.add(path)
        return self._numbers[path]

    def _make(self, path: str) -> int | None:
        from glm_edge_ft.data.images import load_image

        if len(self.urls) >= MAXIMUM_IMAGES:
            self.was_full = True
            return None
        try:
            image = load_image(Path(path))
        except UserError:
            self.missing.add(path)
            return None
        image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        self.urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii"))
        return len(self.urls) - 1

    def take_notes(self) -> list[tuple[str, ...]]:
        """Return what a run's page says about images that are missing from it, and start afresh for the next run."""
        notes: list[tuple[str, ...]] = []
        if self.missing:
            notes.append(("images_missing", str(len(self.missing)), min(self.missing)))
        if self.was_full:
            notes.append(("images_capped", str(MAXIMUM_IMAGES)))
        self.missing.clear()
        return notes
