"""Keys of older versions, and keys that the fine-tuning guide lists without their section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_edge_ft.config.builder import ConfigBuilder
from glm_edge_ft.config.keys import Key, Mismatch, Switch, key_table, library_keys, plain, shown
from glm_edge_ft.config.settings import DATA_KEYS
from glm_edge_ft.config.yaml_source import Section

# values of enumerated keys that transformers 5 no longer has
_OLD_VALUES = {"optim": {"adamw_hf": "adamw_torch"}}


def move_into_sections(builder: ConfigBuilder) -> None:
    """Read keys that the fine-tuning guide lists without their section as those of the section, with a notice."""
    for section, names in (("data_config", tuple(DATA_KEYS)), ("training_args", ("generation_config",))):
        written = [name for name in names if name in builder.values]
        inner = builder.values.get(section)
        if not written or not (inner is None or isinstance(inner, Section)):
            continue
        if inner is None:
            inner = builder.values[section] = Section()
        for name in written:
            old, new = (name,), (section, name)
            if name in inner and builder.is_overridden(old) == builder.is_overridden(new):
                builder.refuse(old, f"`{name}` is given twice", f"`{name}` belongs under {section}: delete this one")
            elif name not in inner or builder.is_overridden(old):
                builder.values.move(name, inner)
            builder.values.pop(name, None)
        verb = "is read as a key" if len(written) == 1 else "are read as keys"
        builder.notice((section, written[0]), f"{', '.join(written)} at the top of the file {verb} of {section}")


def translate_old_names(builder: ConfigBuilder) -> None:
    """Replace keys and values of older versions by today's, each with a notice; refuse old and new that differ."""
    old = key_table()["old"]
    _drop(builder, builder.values, (), old["top"])
    training = builder.values.get("training_args")
    if not isinstance(training, dict):
        return
    _drop(builder, training, ("training_args",), old["training_args"])
    for name, new in old["training_args"].items():
        if name in training:
            _rename(builder, training, name, {"now": new} if isinstance(new, str) else new)
    for name, values in _OLD_VALUES.items():
        value = training.get(name)
        if isinstance(value, str) and value in values:
            training[name] = values[value]
            builder.notice(("training_args", name), f"{value} no longer exists, {values[value]} is used")


def _drop(builder: ConfigBuilder, section: dict[str, Any], path: tuple[str, ...], old: Mapping[str, Any]) -> None:
    """Leave out what has no successor, with a notice; refuse what only the user can write in another way."""
    for name in [name for name in section if isinstance(old.get(name), dict) and "now" not in old[name]]:
        del section[name]
        if "retired" in old[name]:
            builder.notice((*path, name), f"retired and ignored: {old[name]['retired']}")
        else:
            builder.refuse((*path, name), f"`{name}` is not a key of this toolkit", old[name]["replaced"])


def _rename(builder: ConfigBuilder, training: dict[str, Any], name: str, old: Mapping[str, Any]) -> None:
    new = old["now"]
    old_path, new_path = ("training_args", name), ("training_args", new)
    key = library_keys("training_args")[new]
    raw = training.pop(name)
    try:
        value = (Key(Switch | None) if "values" in old else key).read(old_path, raw)
    except Mismatch as mismatch:
        builder.refuse(mismatch.path, mismatch.what, mismatch.fix)
        return
    if "values" in old:
        value = old["values"].get("true" if value else "false")
        if value is None:
            builder.notice(old_path, f"old name for {new}; switched off, it sets nothing")
            return
    if name == "warmup_ratio" and not 0 <= value < 1:  # warmup_steps reads 1 as one step
        builder.refuse(old_path, f"{shown(raw)} is not a fraction from 0 to below 1", "write warmup_steps: 0.1 or so")
        return
    wins = builder.is_overridden(old_path)
    if new in training and wins == builder.is_overridden(new_path):
        try:
            present = key.read(new_path, training[new])
        except Mismatch:
            return  # the bad value is reported under its own name
        if present == value:
            builder.notice(old_path, f"old name for {new}, which is given too with the same value")
        else:
            what = f"{shown(raw)} contradicts {new}: {shown(present)}, today's name for the same setting"
            builder.refuse(old_path, what, f"keep {new} only")
        return
    if new in training and not wins:
        builder.notice(old_path, f"old name for {new}, which --set gives")
        return
    training[new] = value
    builder.written_as[new_path] = old_path
    seen = "" if new.endswith("_token") else f": {plain(value)}"  # a secret is not printed
    builder.notice(old_path, f"old name, read as {new}{seen}")
