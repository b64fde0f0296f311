"""Write `glm_edge_ft/config/library_keys.json`: the keys, types and defaults of transformers' and PEFT's settings.

Importing those libraries takes seconds, and an error in a config is to be shown at once; so the config reads this file.
Run it after an upgrade of either; `tests/config/test_library_keys.py` fails until then:

    python -m tests.write_config_snapshot
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import peft
import transformers
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig

SNAPSHOT = Path(__file__).resolve().parents[1] / "glm_edge_ft" / "config" / "library_keys.json"
Entry = dict[str, Any]

_NAMES = {bool: "bool", int: "int", float: "float", str: "text", Path: "text", dict: "mapping", type(None): "null"}
_ORDER = ("null", "bool", "off", "int", "float", "choice", "section", "list", "mapping", "text", "any")
# texts that GenerationConfig checks only when it is built
_GENERATION_CHOICES = {"early_stopping": ["never"], "cache_implementation": list(ALL_CACHE_IMPLEMENTATIONS)}
# documented with tuples as keys, which YAML and JSON cannot write; the library takes this form as well
_GENERATION_TYPES = {"sequence_bias": "list[list[Any]]"}


def snapshot() -> dict[str, dict[str, Entry]]:
    """Return section → key → what the installed class takes there."""
    training = _dataclass_entries(transformers.Seq2SeqTrainingArguments)
    training["accelerator_config"] = {
        **training["accelerator_config"],
        "types": ["null", "section", "text"],
        "fields": _dataclass_entries(AcceleratorConfig),
    }
    services = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    training["report_to"] = {"types": ["null", "choice", "list[choice]"], "choices": services, "default": "none"}
    return {
        "training_args": training,
        "generation_config": _generation_entries(),
        "LORA": _dataclass_entries(peft.LoraConfig),
        "PREFIX_TUNING": _dataclass_entries(peft.PrefixTuningConfig),
    }


def _dataclass_entries(kind: type) -> dict[str, Entry]:
    hints = typing.get_type_hints(kind)
    return {field.name: _entry(field, hints[field.name]) for field in dataclasses.fields(kind) if field.init}


def _entry(field: dataclasses.Field[Any], hint: Any) -> Entry:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if "choices" in field.metadata:
        hint = typing.Literal[tuple(field.metadata["choices"])]
    options = set(_options(hint))
    if "const" in field.metadata:  # the command-line form without a value means true
        options.add("bool")
    if default is None:
        options.add("null")
    if field.name.endswith(("_steps", "_delay")) and "float" in options:
        options.add("int")  # a step count may be a fraction; a whole one stays whole
    if field.name.endswith("_kwargs"):
        options.discard("text")  # a text for keyword arguments would only be unpacked, and fail, much later
    entry = _typed(options, hint)
    if default is not dataclasses.MISSING:
        entry["default"] = _plain(default)
    return entry


def _typed(options: set[str], hint: Any) -> Entry:
    """Return the entry of a key; free text beside named choices goes: `IntervalStrategy | str` is one of its values."""
    choices = [choice for choice in _choices(hint) if isinstance(choice, str)]
    if choices:
        options.discard("text")
    entry: Entry = {"types": sorted(options, key=lambda name: (_ORDER.index(name.partition("[")[0]), name))}
    if choices:
        entry["choices"] = choices
    sections = [part for part in _parts(hint) if dataclasses.is_dataclass(part)]
    if "section" in options:
        entry["types"] = [name for name in entry["types"] if name != "mapping"]
        entry["fields"] = _dataclass_entries(sections[0])  # type: ignore[arg-type]
    return entry


def _parts(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def _choices(hint: Any) -> Iterator[Any]:
    for part in _parts(hint):
        if typing.get_origin(part) is typing.Literal:
            yield from typing.get_args(part)
        elif isinstance(part, type) and issubclass(part, Enum):
            yield from (member.value for member in part)
        elif typing.get_origin(part) is list:
            yield from _choices(typing.get_args(part)[0])


def _options(hint: Any) -> Iterator[str]:
    """Yield the names of the types that `glm_edge_ft.config.keys` reads; none for a Python object."""
    for part in _parts(hint):
        origin, inner = typing.get_origin(part), typing.get_args(part)
        if origin is typing.Literal:
            yield from {"off" if choice is False else "choice" for choice in inner}
        elif origin in (list, tuple) or part in (list, tuple):
            items = [name for argument in inner for name in _options(argument)]
            yield f"list[{items[0]}]" if origin is list and len(inner) == 1 else "list"
        elif origin is dict:
            yield "mapping"
        elif part is Any:
            yield "any"
        elif part in _NAMES:
            yield _NAMES[part]
        elif isinstance(part, type) and issubclass(part, Enum):
            yield "choice"
        elif dataclasses.is_dataclass(part) and part.__module__.startswith("peft."):
            yield "section"


def _generation_entries() -> dict[str, Entry]:
    """Read the attributes of `GenerationConfig`, which has no annotations: its docstring states their types."""
    documented = dict(
        re.findall(r"^ {8}(\w+):? *\((.+?)\)+: *$", transformers.GenerationConfig.__doc__ or "", flags=re.MULTILINE)
    )
    names = [name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")]
    names.remove("transformers_version")
    entries = {}
    for name in names:
        hint = _documented_type(_GENERATION_TYPES.get(name) or documented.get(name, "Any"))
        if name in _GENERATION_CHOICES:
            hint = hint | typing.Literal[tuple(_GENERATION_CHOICES[name])]
        entries[name] = {**_typed({*_options(hint), "null"}, hint), "default": None}
    return entries


def _documented_type(text: str) -> Any:
    """Turn a docstring's type, such as "`int` or `list[int]`, *optional*", into a type."""
    kind = re.split(r", *\*optional|, *default", text)[0].replace("`", "")
    kind = re.sub(r"\btuple\(.*", "tuple", kind).replace(" or ", " | ")
    known = {**vars(typing), **vars(transformers.generation.configuration_utils)}
    try:
        return eval(kind, known)  # the docstring of an installed library
    except (NameError, SyntaxError, TypeError):
        return Any


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.value if isinstance(value, Enum) else value


def text() -> str:
    """Return the content of the file: a line for each key."""
    sections = []
    for section, entries in snapshot().items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        sections.append(f"  {json.dumps(section)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(text(), encoding="utf-8")
