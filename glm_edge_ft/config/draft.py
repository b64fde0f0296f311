"""The configuration while it is being checked: sections already typed, mistakes and notices so far."""

from __future__ import annotations

import json
from typing import Any

from glm_edge_ft.config.document import Document, KeyPath
from glm_edge_ft.errors import Problem, UserError

TRAINING: tuple[str, ...] = ("training_args",)
PEFT: tuple[str, ...] = ("peft_config",)


class Draft:
    """Collects what the checks of one configuration find.

    Attributes:
        document: the values as written, with their places.
        top, data, training, generation: the typed values of each section.
        peft: the typed `peft_config`, or None for full fine-tuning.
        notices: one line each, for what is accepted but not as written.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.top: dict[str, Any] = {}
        self.data: dict[str, Any] = {}
        self.training: dict[str, Any] = {}
        self.generation: dict[str, Any] = {}
        self.peft: dict[str, Any] | None = None
        self.notices: list[str] = []
        self._problems: list[tuple[float, Problem]] = list(document.problems)

    def refuse(self, path: KeyPath, what: str, fix: str) -> None:
        """Note a mistake at a key and go on."""
        where = self.document.where(path)
        line = self.document.line(path)
        self._problems.append((line or float("inf"), Problem(where, what, fix)))

    def notice(self, path: KeyPath, text: str) -> None:
        """Note something that the user should know in one line, with its place."""
        self.notices.append(f"{self.document.where(path)}: {text}")

    def wrote(self, *path: str) -> bool:
        """Whether the user wrote this key, whatever its value, or something unusable in place of its section."""
        values: Any = self.document.values
        for part in path:
            if values is not None and not isinstance(values, dict):
                return True
            if values is None or part not in values:
                return False
            values = values[part]
        return True

    def refused(self, section: dict[str, Any], *path: str) -> bool:
        """Whether the user wrote a key that is not among the typed values, so that rules about it must wait."""
        return path[-1] not in section and self.wrote(*path)

    @staticmethod
    def plain(value: Any) -> str:
        """Write a value as YAML and JSON both read it, texts without quotes."""
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    def raise_if_any(self) -> None:
        """Raise every mistake found, in the order of the file's lines, `--set` options last."""
        if self._problems:
            raise UserError(problem for _, problem in sorted(self._problems, key=lambda entry: entry[0]))
