"""The configuration while it is being checked: typed sections, errors and notices so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_edge_ft.config.keys import PEFT_TYPES, Key, Mismatch, key_table, library_keys, nearest, shown
from glm_edge_ft.config.settings import DATA_KEYS, SECTIONS, TOP_KEYS
from glm_edge_ft.config.yaml_source import KeyPath, Problems, Section, dotted
from glm_edge_ft.errors import Problem

TRAINING: tuple[str, ...] = ("training_args",)
GENERATION = (*TRAINING, "generation_config")
PEFT: tuple[str, ...] = ("peft_config",)


class ConfigBuilder:
    """Collects what the checks of one configuration find.

    Attributes:
        path: the file as the user named it.
        values: the mapping at the top, `--set` options applied.
        written_as: key path of today's name → the key path that the user wrote.
        top, data, training, generation: the typed values of each section.
        peft: the typed `peft_config`, or None for full fine-tuning.
    """

    def __init__(self, path: Path, values: Section, problems: Problems) -> None:
        self.path = path
        self.values = values
        self.written_as: dict[KeyPath, KeyPath] = {}
        self.top: dict[str, Any] = {}
        self.data: dict[str, Any] = {}
        self.training: dict[str, Any] = {}
        self.generation: dict[str, Any] = {}
        self.peft: dict[str, Any] | None = None
        self._notices: list[tuple[float, str]] = []
        self._problems = list(problems)

    def line(self, path: KeyPath) -> float | None:
        """Return the line of a key, or of the nearest section around it; None for what is written nowhere."""
        value: Any = self.values
        found: float | None = None
        for part in self.written_as.get(path, path):
            if not isinstance(value, Section):
                break
            found, value = value.lines.get(str(part), found), value.get(str(part))
        return found

    def is_overridden(self, path: KeyPath) -> bool:
        """Return whether a `--set` option wrote this key or a section around it."""
        return self.line(path) == math.inf

    def where(self, path: KeyPath) -> str:
        """Return the place of a key for messages: `lora.yaml:12: training_args.max_steps` or `--set KEY`."""
        line, key = self.line(path), dotted(self.written_as.get(path, path))
        if line in (0, math.inf):
            return f"--set {key}"
        return f"{self.path}: {key}" if line is None else f"{self.path}:{line}: {key}"

    def refuse_if(self, condition: object, path: KeyPath, what: str, fix: str) -> None:
        """Note an error at a key where a condition holds."""
        if condition:
            self.refuse(path, what, fix)

    def refuse(self, path: KeyPath, what: str, fix: str) -> None:
        """Note an error at a key and go on."""
        self._problems.append((self.line(path) or math.inf, Problem(self.where(path), what, fix)))

    def notice(self, path: KeyPath, text: str) -> None:
        """Note something that the user should know in one line, with its place."""
        self._notices.append((self.line(path) or math.inf, f"{self.where(path)}: {text}"))

    @property
    def notices(self) -> tuple[str, ...]:
        """One line each, for what is accepted but not as written, in the order of the file's lines."""
        return tuple(text for _, text in sorted(self._notices, key=lambda entry: entry[0]))

    @property
    def problems(self) -> list[Problem]:
        """Every error found, in the order of the file's lines, `--set` options last."""
        return [problem for _, problem in sorted(self._problems, key=lambda entry: entry[0])]

    def is_set(self, *path: str) -> bool:
        """Return whether the user wrote this key, whatever its value, or something unusable in place of its section."""
        values: Any = self.values
        for part in path:
            if values is not None and not isinstance(values, dict):
                return True
            if values is None or part not in values:
                return False
            values = values[part]
        return True

    def is_refused(self, section: Mapping[str, Any], *path: str) -> bool:
        """Return whether a key was written and is not among the typed values, so that rules about it must wait."""
        return path[-1] not in section and self.is_set(*path)

    def raw_section(self, path: KeyPath) -> dict[str, Any]:
        """Return the keys of a section as written; an absent or null one is empty, another kind of value is refused."""
        value: Any = self.values
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            what = f"{shown(value)} is not a mapping of keys"
            self.refuse(path, what, "write its keys below it, indented by two spaces")
        return dict(value) if isinstance(value, dict) else {}

    def read_section(self, path: KeyPath, raw: Mapping[str, Any], known: Mapping[str, Key]) -> dict[str, Any]:
        """Return the typed values of a section; unknown keys and mistyped values are noted and left out."""
        typed = {}
        for name, value in raw.items():
            if name not in known:
                self._refuse_unknown((*path, name), known)
            elif known[name].fields and isinstance(value, dict):
                typed[name] = self.read_section((*path, name), value, known[name].fields)
            else:
                try:
                    typed[name] = known[name].read((*path, name), value)
                except Mismatch as mismatch:
                    self.refuse(mismatch.path, mismatch.what, mismatch.fix)
        return typed

    def _refuse_unknown(self, path: KeyPath, known: Mapping[str, Key]) -> None:
        """Refuse an unknown key with the key most likely meant, or the section that it belongs to."""
        key, section = str(path[-1]), dotted(path[:-1])
        places = {
            "at the top of the file": (*TOP_KEYS, *SECTIONS),
            "under data_config": DATA_KEYS,
            "under training_args": (*library_keys("training_args"), *key_table()["old"]["training_args"]),
            "under training_args.generation_config": library_keys("generation_config"),
            "under peft_config": [name for kind in PEFT_TYPES for name in library_keys(kind)],
        }
        elsewhere = [place for place, names in places.items() if key in names and place != f"under {section}"]
        names = [*known, *SECTIONS, *DATA_KEYS] if not section else [*known]
        if section == "training_args":
            names.append("generation_config")
        close = nearest(key, names)
        if elsewhere:
            fix = f"`{key}` belongs {' or '.join(elsewhere)}"
        else:
            listing = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            fix = f"did you mean {close}?" if close else f"leave it out; keys here: {listing}"
        self.refuse(path, f"unknown key `{key}`", fix)
