"""The keys of a config: their types, and a value in YAML → the type of its key.

transformers' and PEFT's keys come from `library_keys.json`, a snapshot of the installed classes: importing those takes
seconds, and an error in a config is to be shown at once. `keys.toml` states which of them are refused, have no effect,
or had another name.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, Strict, TypeAdapter, ValidationError, WrapValidator

from glm_edge_ft.config.yaml_source import KeyPath, PlainScalar
from glm_edge_ft.errors import shorten

PEFT_TYPES = ("LORA", "PREFIX_TUNING")
_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\s*")
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS: Mapping[Any, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"},
    **{dict: "a mapping of keys", Any: "anything"},
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def plain_value(value: Any, *, strict: bool = True) -> Any:
    """Return a value from YAML or JSON as the types of Python.

    Raises ValueError where it is `strict` and a number is not finite, or has more than 64 bits.
    """
    if isinstance(value, dict):
        return {key: plain_value(inner, strict=strict) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_value(inner, strict=strict) for inner in value]
    number = value.value if isinstance(value, PlainScalar) else value
    if not strict:
        return number
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{shown(value)} is not a finite number")
    if isinstance(number, int) and abs(number) >= 2**63:
        raise ValueError(f"{shown(value)} has more than the 64 bits of a whole number")
    return number


def _read_number(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, PlainScalar) and len(value) < 100 and _NUMBER.fullmatch(value):
        value = PlainScalar(value, float(value))
    number = plain_value(value)
    return int(number) if isinstance(number, float) and number.is_integer() and abs(number) < 2**63 else number


def _read_switch(value: Any) -> Any:
    return value.value if isinstance(value, PlainScalar) else _SWITCHES.get(str(value).strip().lower(), value)


def _read_text(value: str) -> str:
    if value == "None":
        raise ValueError("`None` is a text in YAML")
    return str(value)


def _read_mapping(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{shown(value)} is not valid JSON: {error}") from error
    return plain_value(value) if isinstance(value, dict) else value


Switch = Annotated[bool, Strict(), BeforeValidator(_read_switch)]
Whole = Annotated[int, Strict(), BeforeValidator(_read_number)]
Number = Annotated[float, Strict(), BeforeValidator(_read_number)]
Text = Annotated[str, Strict(), AfterValidator(_read_text)]
_Mapping = Annotated[dict[str, Any], BeforeValidator(_read_mapping)]
_Anything = Annotated[Any, BeforeValidator(plain_value)]
_TYPES: Mapping[str, Any] = {
    **{"null": None, "bool": Switch, "int": Whole, "float": Number, "text": Text, "any": _Anything},
    **{"mapping": _Mapping, "section": dict[str, Any], "list": list[_Anything]},
    "off": Annotated[Literal[False], BeforeValidator(_read_switch)],
}


def _choice(choices: list[str]) -> Any:
    """Return the type of an enumerated key; `pissa_niter_[number of iters]` stands for every such number."""
    numbered = [re.escape(choice.partition("[")[0]) + "[0-9]+" for choice in choices if "[" in choice]

    def read(value: Any, validate: Any) -> Any:
        if isinstance(value, PlainScalar) and value.value is False and "no" in choices:
            return "no"  # YAML reads a bare `no` as false
        if isinstance(value, str) and any(re.fullmatch(pattern, value) for pattern in numbered):
            return str(value)
        return validate(str(value) if isinstance(value, PlainScalar) else value)

    return Annotated[Literal[tuple(choices)], WrapValidator(read)]


def _whole_or_fraction(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"`{value}` is neither a whole number of steps nor a fraction of all steps below 1")
    return value


def _type_of(name: str, entry: Mapping[str, Any], rule: Mapping[str, Any]) -> Any:
    if name.startswith("list["):
        items: Any = GenericAlias(list, (_type_of(name[5:-1], entry, {}),))
        splits = BeforeValidator(lambda value: value.split() if isinstance(value, str) else value)
        return Annotated[items, splits] if name == "list[choice]" else items
    found = _choice(entry["choices"]) if name == "choice" else _TYPES[name]
    if name not in ("int", "float"):
        return found
    found = Annotated[found, Field(**{bound: rule[bound] for bound in _BOUNDS if bound in rule})]
    if "steps" in rule:
        found = Annotated[found, AfterValidator(_whole_or_fraction)]
    return Annotated[Literal[rule["also"]], BeforeValidator(_read_number)] | found if "also" in rule else found


class Mismatch(Exception):
    """A value that its key does not take: `path` is the place of it, `what` and `fix` are for a `Problem`."""

    def __init__(self, path: KeyPath, what: str, fix: str) -> None:
        super().__init__(what)
        self.path, self.what, self.fix = path, what, fix


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        type: what pydantic reads it as.
        default: the value where the key is not written; None too where it must be written.
        fields: the keys of a nested section.
        rule: what `keys.toml` states of it.
        description: what it does, for this toolkit's own keys.
    """

    type: Any
    default: Any = None
    fields: Mapping[str, Key] = field(default_factory=dict)
    rule: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """What reads a value of this key."""
        several = _is_union(self.type) and len(set(get_args(self.type)) - {NoneType}) > 1
        kind: Any = Annotated[self.type, Field(union_mode="left_to_right")] if several else self.type
        return TypeAdapter(kind)

    @property
    def choices(self) -> list[str]:
        """The texts that an enumerated key takes; none for another key."""
        return [choice for choice in _literals(self.type) if isinstance(choice, str)]

    def read(self, path: KeyPath, value: Any) -> Any:
        """Return a value from YAML as the type of this key.

        Raises:
            Mismatch: it is of another kind, out of range or none of the choices.
        """
        if value is not None and self.type in (None, NoneType):
            raise Mismatch(path, "takes a Python object, which a YAML file cannot write", "leave it out")
        try:
            return self.adapter.validate_python(value)
        except RecursionError:
            raise Mismatch(path, "is nested too deeply", "write it flat") from None
        except ValidationError as error:
            raise self._mismatch(path, value, error) from None

    def _mismatch(self, path: KeyPath, value: Any, error: ValidationError) -> Mismatch:
        found = error.errors(include_url=False)
        for part in max((detail["loc"] for detail in found), key=len):  # the names of types in it are passed over
            if isinstance(value, list) and isinstance(part, int) and part < len(value):
                path, value = (*path, part), value[part]
        default = "" if self.default in (None, "", [], {}) else f"; the default is {plain(self.default)}"
        fix = f"write {words(self.type)}{default}"
        for detail in found:
            bound = next((bound for bound in _BOUNDS if bound in detail.get("ctx", {})), None)
            if detail["type"] == "value_error":
                return Mismatch(path, detail["msg"].removeprefix("Value error, "), fix)
            if bound is not None:
                also = f"{self.rule['also']}, or " if "also" in self.rule else ""
                bounds = {known: self.rule[known] for known in _BOUNDS if known in self.rule} or detail["ctx"]
                range_ = " and ".join(f"{_BOUNDS[known]} {limit}" for known, limit in bounds.items())
                return Mismatch(path, f"{shown(value)} is out of range", f"write {also}a number {range_}")
        seen = shown(value)
        close = nearest(value, self.choices) if isinstance(value, str) else None
        what = f"{seen} is not a value it takes" if self.choices else f"{seen} is not {words(self.type)}"
        lead = "leave the key out for its default, or " if value is None else f"did you mean {close}? " if close else ""
        return Mismatch(path, what, lead + fix)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _literals(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in _literals(part)]


def words(kind: Any) -> str:
    """Return in words what may be written: `a number or null`, `one of no, steps, epoch`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return words(parts[0])
    if _is_union(kind):
        found = sorted(map(words, parts), key=lambda text: (text == "null", text.startswith("a list")))
        listed = [f"a list, each item {text}" for text in found]
        return " or ".join(dict.fromkeys("a list of them" if text in listed else text for text in found))
    if origin is Literal and type(parts[0]) is int:
        return _WORDS[int]
    if origin is Literal:
        return "one of " + ", ".join(str(choice).lower() if choice is False else str(choice) for choice in parts)
    if origin is list and words(parts[0]) != "anything":
        return f"a list, each item {words(parts[0])}"
    return "a list" if origin is list else _WORDS[origin or kind]


def shown(value: Any) -> str:
    """Return a value as the user sees it, at most 60 characters, in backquotes."""
    text = plain(value)
    return f"`{shorten(text, 60)}`" if text else "an empty text"


def plain(value: Any) -> str:
    """Return a value as YAML and JSON both read it, texts without quotes."""
    if isinstance(value, str):
        return value
    return json.dumps(plain_value(value, strict=False), ensure_ascii=False, default=str)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the name that a mistyped word most likely means, or None when none is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


@cache
def key_table() -> dict[str, Any]:
    """Return the content of `keys.toml`."""
    return tomllib.loads((Path(__file__).parent / "keys.toml").read_text(encoding="utf-8"))


@cache
def library_keys(section: str) -> dict[str, Key]:
    """Return the keys of `training_args`, `generation_config`, `LORA` or `PREFIX_TUNING` by name."""
    rules = section_rules("peft_config" if section in PEFT_TYPES else section)
    snapshot = json.loads((Path(__file__).parent / "library_keys.json").read_text(encoding="utf-8"))
    return {name: _key(entry, rules.get(name, {})) for name, entry in snapshot[section].items()}


@cache
def section_rules(section: str) -> dict[str, dict[str, Any]]:
    """Return key → what `keys.toml` states of it."""
    single = {name: rule for name, rule in key_table()[section].items() if name != "rules"}
    shared = {name: rule for rule in key_table()[section]["rules"] for name in rule["keys"]}
    return {name: {**single.get(name, {}), **shared.get(name, {})} for name in (*single, *shared)}


def _key(entry: Mapping[str, Any], rule: Mapping[str, Any]) -> Key:
    types = tuple(_type_of(name, entry, rule) for name in entry["types"])
    fields = {name: _key(inner, {}) for name, inner in entry.get("fields", {}).items()}
    return Key(Union[types], entry.get("default"), fields, rule)  # noqa: UP007
