"""The values of one configuration, each with the place where the user wrote it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge_ft.errors import Problem

KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """The values of one configuration, with the place of each.

    Attributes:
        name: the file as the user named it, for messages.
        folder: the folder of the file, which relative paths inside it start from.
        values: the mapping at the top, `--set` options applied.
        lines: key path → line, counted from 1.
        texts: key path → the text of a plain scalar that YAML reads as something other than text.
        overridden: key paths that a `--set` option wrote.
        written_as: key path of today's name → the key path that the user wrote.
        problems: mistakes that did not keep the rest from being read, each with its line; infinity for `--set`.
    """

    name: str
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    overridden: set[KeyPath] = field(default_factory=set)
    written_as: dict[KeyPath, KeyPath] = field(default_factory=dict)
    problems: list[tuple[float, Problem]] = field(default_factory=list)

    def is_overridden(self, path: KeyPath) -> bool:
        """Whether a `--set` option wrote this key or a section around it."""
        return any(path[:length] in self.overridden for length in range(1, len(path) + 1))

    def line(self, path: KeyPath) -> int | None:
        """The line of a key, or of the nearest section around it; None for what no line of the file says."""
        path = self.written_as.get(path, path)
        if self.is_overridden(path):
            return None
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)

    def where(self, path: KeyPath) -> str:
        """The place of a key as messages name it: `lora.yaml:12: training_args.max_steps` or `--set KEY`."""
        path = self.written_as.get(path, path)
        below = [known for known in self.overridden if path and known[: len(path)] == path and path not in self.lines]
        if self.is_overridden(path) or below:
            return f"--set {dotted(min(below, default=path, key=len))}"
        line = self.line(path)
        place = self.name if line is None else f"{self.name}:{line}"
        return f"{place}: {dotted(path)}" if path else place

    def move(self, path: KeyPath, new: KeyPath) -> None:
        """Let a key and everything below it be known by another path, with the place that it was written at."""
        self.forget(new)
        for table in (self.lines, self.texts):
            for known in [known for known in table if known[: len(path)] == path]:
                table[new + known[len(path) :]] = table.pop(known)  # type: ignore[assignment]
        moved = {known for known in self.overridden if known[: len(path)] == path}
        self.overridden = self.overridden - moved | {new + known[len(path) :] for known in moved}

    def forget(self, path: KeyPath) -> None:
        """Drop the lines, texts and override marks of a key and of everything below it."""
        for table in (self.lines, self.texts):
            for known in [known for known in table if known[: len(path)] == path]:
                del table[known]
        self.overridden -= {known for known in self.overridden if known[: len(path)] == path}


def dotted(path: KeyPath) -> str:
    """Write a key path as `--set` takes it: `peft_config.target_modules[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the name that a mistyped word most likely means, or None when none is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None
