"""A YAML value → the type that its key declares, or what is wrong with it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from glm_edge_ft.config.document import Document, KeyPath, nearest
from glm_edge_ft.config.schema import Field, Kind, TypeOption
from glm_edge_ft.errors import shorten

LARGEST_INTEGER = 2**63 - 1
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_EXPECTED = {
    "null": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "a text",
    "list": "a list",
    "mapping": "a mapping of keys",
    "section": "a mapping of keys",
    "any": "anything",
}


class Mismatch(Exception):
    """A value that its key does not take: `path` names the part of it, `what` and `fix` are for a `Problem`."""

    def __init__(self, path: KeyPath, what: str, fix: str) -> None:
        super().__init__(what)
        self.path, self.what, self.fix = path, what, fix


def coerce(document: Document, path: KeyPath, value: Any, field: Field) -> Any:
    """Return a value as the type that its field declares: `"8"` and `3.2e1` are whole numbers where one is declared.

    Raises:
        Mismatch: the value is of another kind, not one of the choices, or not a finite number.
    """
    if not field.options or field.annotation.startswith(("ParallelismConfig", "CompileConfig")):
        if value is None:
            return None
        raise Mismatch(path, "takes a Python object, which a YAML file cannot write", "leave it out")
    try:
        return _Coercion(document, field).apply(value, path, field.options)
    except RecursionError:
        raise Mismatch(path, "is nested too deeply", "write it flat") from None


def shown(value: Any, text: str | None = None) -> str:
    """Write a value as the user sees it, at most 60 characters, in backquotes."""
    if text is None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"`{shorten(text, 60)}`" if text else "an empty text"


def expected(options: tuple[TypeOption, ...]) -> str:
    """Say in words what may be written: `a number or null`, `one of no, steps, epoch`."""
    words: list[str] = []
    for option in options:
        word = _EXPECTED.get(option.kind, "")
        if option.kind == "choice":
            word = "one of " + ", ".join(_choice_text(choice) for choice in option.choices)
        elif option.kind == "list" and option.items:
            word = "a list, each item " + expected(option.items)
        if word not in words:
            words.append(word)
    words.sort(key=lambda word: word == "null")
    return " or ".join(words)


def _choice_text(choice: str | bool) -> str:
    return choice if isinstance(choice, str) else str(choice).lower()


class _Coercion:
    """Applies type options to the value of one field."""

    def __init__(self, document: Document, field: Field) -> None:
        self.document = document
        self.field = field

    def apply(self, value: Any, path: KeyPath, options: tuple[TypeOption, ...]) -> Any:
        """Return the typed value of one place; an empty tuple of options takes anything."""
        if value is None:
            if not options or _find(options, "any") or _find(options, "null"):
                return None
            if not _find(options, "choice") and not _find(options, "text"):
                raise self._mismatch(value, path, options, "leave the key out for its default, or write ")
            value = self._written(path) or "null"
        if isinstance(value, dict):
            return self._mapping(value, path, options)
        if isinstance(value, list):
            return self._list(value, path, options)
        if isinstance(value, bool):  # before int, which bool is a kind of
            return self._bool(value, path, options)
        reader = self._number if isinstance(value, (int, float)) else self._text
        return reader(value, path, options)

    def _bool(self, value: bool, path: KeyPath, options: tuple[TypeOption, ...]) -> Any:
        choices = _choices(options)
        if _takes(options, "bool") or any(choice is value for choice in choices):
            return value
        if value is False and "no" in choices:
            return "no"  # YAML reads a bare `no` as false
        if choices or _find(options, "text"):
            return self._text(self._written(path) or str(value).lower(), path, options)
        raise self._mismatch(value, path, options)

    def _number(self, value: float, path: KeyPath, options: tuple[TypeOption, ...]) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise self._mismatch(value, path, options)
        if abs(value) > LARGEST_INTEGER and (isinstance(value, int) or _find(options, "int")):
            raise Mismatch(path, f"{shown(value)} has more than the 64 bits of a whole number", "write a smaller one")
        if not options or _find(options, "any"):
            return value
        if _find(options, "int") and value == int(value):
            return int(value)
        if _find(options, "float"):
            # step counts are declared as floats because they may be fractions; a whole one stays whole
            keeps_int = isinstance(value, int) and self.field.name.endswith(("_steps", "_delay"))
            return value if keeps_int else float(value)
        if _find(options, "choice") or _find(options, "text"):
            return self._text(self._written(path) or str(value), path, options)
        raise self._mismatch(value, path, options)

    def _text(self, value: str, path: KeyPath, options: tuple[TypeOption, ...]) -> Any:
        choices, as_list = _choices(options), _find(options, "list")
        if any(_matches(value, choice) for choice in choices):
            return value
        if value == "None" and _find(options, "null"):
            raise Mismatch(path, "`None` is a text in YAML", "write null")
        if value.startswith("{") and _find(options, "mapping"):
            return self._json(value, path)
        if as_list and any(item.choices for item in as_list.items):
            return self._list(value.split(), path, options)
        # a text for keyword arguments would only be unpacked, and fail, much later
        if _takes(options, "text") and not (options and self.field.name.endswith("_kwargs")):
            return value
        return self._quoted(value, path, options)

    def _quoted(self, value: str, path: KeyPath, options: tuple[TypeOption, ...]) -> Any:
        """Read a number or a switch that was written as a text, such as `"8"`."""
        word = value.strip().lower()
        if (_find(options, "int") or _find(options, "float")) and len(word) < 100 and _NUMBER.fullmatch(word):
            if not math.isfinite(float(word)):
                raise Mismatch(path, f"{shown(value)} is not a finite number", f"write {expected(options)}")
            return self._number(float(word), path, options)
        if _find(options, "bool") and word in (*_TRUE, *_FALSE):
            return word in _TRUE
        close = nearest(value, [choice for choice in _choices(options) if isinstance(choice, str)])
        raise self._mismatch(value, path, options, f"did you mean {close}? write " if close else "write ")

    def _list(self, value: list[Any], path: KeyPath, options: tuple[TypeOption, ...]) -> Any:
        option = _find(options, "list")
        if option is None and options and not _find(options, "any"):
            raise self._mismatch(value, path, options)
        items = option.items if option else ()
        return [self.apply(item, (*path, index), items) for index, item in enumerate(value)]

    def _mapping(self, value: dict[str, Any], path: KeyPath, options: tuple[TypeOption, ...]) -> Any:
        section = _find(options, "section")
        if section is None:
            if not _takes(options, "mapping"):
                raise self._mismatch(value, path, options)
            return {key: self.apply(item, (*path, key), ()) for key, item in value.items()}
        fields = {field.name: field for field in section.fields}
        for key in value:
            if key not in fields:
                close = nearest(key, fields)
                fix = f"did you mean {close}?" if close else f"its keys: {', '.join(fields)}"
                raise Mismatch((*path, key), f"unknown key `{key}`", fix)
        return {key: coerce(self.document, (*path, key), item, fields[key]) for key, item in value.items()}

    def _json(self, value: str, path: KeyPath) -> Any:
        try:
            loaded = json.loads(value)
        except ValueError as error:
            raise Mismatch(path, f"{shown(value)} is not valid JSON: {error}", "write the keys as YAML") from error
        return self.apply(loaded, path, ())

    def _written(self, path: KeyPath) -> str | None:
        return self.document.texts.get(path)

    def _mismatch(self, value: Any, path: KeyPath, options: tuple[TypeOption, ...], lead: str = "write ") -> Mismatch:
        written = self._written(path)
        seen = "an empty value" if value is None and not written else shown(value, written)
        wanted = expected(options)
        what = f"{seen} is not a value it takes" if _choices(options) else f"{seen} is not {wanted}"
        if isinstance(value, float) and not math.isfinite(value):
            what = f"{seen} is not a finite number"
        default = self.field.default
        plain = default is not None and default != "None" and re.fullmatch(r"[-+.\w']+", default)
        return Mismatch(path, what, lead + wanted + (f"; the default is {default}".replace("'", "") if plain else ""))


def _find(options: tuple[TypeOption, ...], kind: Kind) -> TypeOption | None:
    return next((option for option in options if option.kind == kind), None)


def _takes(options: tuple[TypeOption, ...], kind: Kind) -> bool:
    """Whether a kind of value is among the options, or anything is."""
    return not options or any(option.kind in (kind, "any") for option in options)


def _choices(options: tuple[TypeOption, ...]) -> tuple[str | bool, ...]:
    return tuple(choice for option in options for choice in option.choices)


def _matches(value: str, choice: str | bool) -> bool:
    """Whether a text is the choice; `pissa_niter_[number of iters]` stands for every such number."""
    if not isinstance(choice, str):
        return False
    stem, bracket, _ = choice.partition("[number")
    return bool(re.fullmatch(re.escape(stem) + "[0-9]+", value)) if bracket else value == choice
