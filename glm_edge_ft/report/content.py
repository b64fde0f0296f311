"""What the page's script draws from: curves, evaluations and predictions as JSON-able data, capped in size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge_ft.report.reading import Note, PredictionFile, RunFolder
from glm_edge_ft.training.curves import is_number
from glm_edge_ft.training.metrics import METRIC_NAMES

MAXIMUM_ROWS = 1000
"""Rows of one predictions file: the best and the worst halves of more."""
MAXIMUM_ROWS_IN_ALL = 8000
"""Rows of the page: where it has more files than fit with MAXIMUM_ROWS each, every file gets fewer of them."""
MINIMUM_ROWS = 50
MAXIMUM_DEPTH = 50
"""Levels of lists and objects that the page shows of `run.json`."""
MAXIMUM_CHARACTERS = 4000
MAXIMUM_IMAGES = 400
THUMBNAIL_PIXELS = 160
CAPPED_BY = "rouge-l"
_ABOUT_A_RUN = ("model", "data_dir", "config_file", "overrides", "resumed_from", "config", "facts", "data", "versions")
_PREFIXES = ("eval", "test")


def build_content(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return the data of the page: `runs`, each with curves, evaluations and predictions, and what they share.

    Every number is finite or None. A row of predictions is
    `[place, prompt, reference, prediction, [scores in the order of "metrics"], [numbers in "images"]]`, the first four
    as numbers in "texts": each evaluation of a run repeats all prompts and references.
    """
    shared = _Shared.for_files(sum(len(run.predictions) for run in runs))
    described = [_describe(run, name, shared) for run, name in zip(runs, _names(runs), strict=True)]
    return {"metrics": METRIC_NAMES, "runs": described, "texts": list(shared.texts), "images": shared.thumbnails.urls}


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell the runs apart."""
    paths = [run.folder.resolve() for run in runs]
    names: list[str] = []
    for path in paths:
        deep = next((n for n in range(1, 4) if sum(p.parts[-n:] == path.parts[-n:] for p in paths) == 1), 1)
        name = "/".join(path.parts[-deep:])
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _describe(run: RunFolder, name: str, shared: _Shared) -> dict[str, Any]:
    notes, thumbnails = list(run.notes), shared.thumbnails
    files = [_describe_file(file, shared, notes) for file in run.predictions]
    if thumbnails.missing:
        notes.append(Note("images_missing", (str(len(thumbnails.missing)), sorted(thumbnails.missing)[0])))
        thumbnails.missing.clear()
    if thumbnails.was_full:
        notes.append(Note("images_capped", (str(MAXIMUM_IMAGES),)))
    return {
        "name": name,
        "folder": str(run.folder),
        "record": finite({key: run.record[key] for key in _ABOUT_A_RUN if key in run.record}),
        "curves": {key: list(zip(*points, strict=True)) for key, points in run.curves.items()},
        "evaluations": evaluations(run.log_lines),
        "ended": finite(next((line for line in reversed(run.log_lines) if "train_runtime" in line), None)),
        "files": files,
        "notes": [[note.key, *note.values] for note in notes],
    }


def evaluations(log_lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each evaluation: `set` (eval or test), `step`, the `model` where several were measured, and its scores."""
    found = []
    for line in log_lines:
        for prefix in _PREFIXES:
            if f"{prefix}_loss" in line or f"{prefix}_{CAPPED_BY}" in line:
                numbers = {name: line.get(f"{prefix}_{name}") for name in ("loss", *METRIC_NAMES)}
                numbers["step"] = line.get("step")
                model = str(line["model"]) if line.get("model") is not None else None
                known = {name: value if is_number(value) else None for name, value in numbers.items()}
                found.append({"set": prefix, "model": model, **known})
    return found


def finite(value: Any, depth: int = MAXIMUM_DEPTH) -> Any:
    """Return JSON-able data with None in place of numbers that no float can hold, and of what is nested deeper."""
    if isinstance(value, dict) and depth:
        return {str(key): finite(part, depth - 1) for key, part in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [finite(part, depth - 1) for part in value]
    return value if isinstance(value, str | bool) or is_number(value) else None


def _describe_file(file: PredictionFile, shared: _Shared, notes: list[Note]) -> dict[str, Any]:
    rows = list(file.rows)
    if len(rows) > shared.rows_of_a_file:
        order = sorted(range(len(rows)), key=lambda index: _score(rows[index], CAPPED_BY) or 0.0)
        half = shared.rows_of_a_file // 2
        rows = [rows[index] for index in sorted(order[:half] + order[-half:])]
        notes.append(Note("rows_capped", (file.name, str(len(rows)), str(len(file.rows)), str(half))))
    return {"name": file.name, "rows": [_describe_row(row, shared) for row in rows]}


def _describe_row(row: dict[str, Any], shared: _Shared) -> list[Any]:
    place = ":".join(str(row[key]) for key in ("file", "line", "turn") if key in row)
    prompt = str(row.get("prompt") or "")
    prompt = prompt if len(prompt) <= MAXIMUM_CHARACTERS else "… " + prompt[-MAXIMUM_CHARACTERS:]
    images = row.get("images")
    paths = [path for path in images if isinstance(path, str)] if isinstance(images, list) else []
    texts = (place, prompt, _shorten(row["reference"]), _shorten(row["prediction"]))
    scores = [_score(row, name) for name in METRIC_NAMES]
    return [*map(shared.number, texts), scores, [shared.thumbnails.add(path) for path in paths]]


def _score(row: dict[str, Any], name: str) -> float | None:
    value: Any = row.get(name)
    return round(value, 2) if is_number(value) else None


def _shorten(text: str) -> str:
    left = len(text) - MAXIMUM_CHARACTERS
    return text if left <= 0 else f"{text[:MAXIMUM_CHARACTERS]} … (+{left:,})"


class _Thumbnails:
    """Pictures as small JPEGs in `data:` URLs, each once."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.missing: set[str] = set()
        self.was_full = False
        self._numbers: dict[str, int | None] = {}

    def add(self, path: str) -> int | None:
        """Return the number of a picture's URL; None where it cannot be read, or the page has enough pictures."""
        if path not in self._numbers:
            self._numbers[path] = self._make(path)
        elif self._numbers[path] is None and not self.was_full:
            self.missing.add(path)
        return self._numbers[path]

    def _make(self, path: str) -> int | None:
        from glm_edge_ft.data.images import load_image
        from glm_edge_ft.errors import UserError

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


@dataclass(frozen=True)
class _Shared:
    """What the files of predictions share: the number of each text, the pictures, how many rows a file may have."""

    rows_of_a_file: int
    texts: dict[str, int] = field(default_factory=dict)
    thumbnails: _Thumbnails = field(default_factory=_Thumbnails)

    @classmethod
    def for_files(cls, files: int) -> _Shared:
        return cls(min(MAXIMUM_ROWS, max(MINIMUM_ROWS, MAXIMUM_ROWS_IN_ALL // max(files, 1))))

    def number(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))
