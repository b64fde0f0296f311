"""One YAML file → one typed, strict `RunConfig`, or every error in it at once.

Nothing heavy is imported here: an error shows at once.

    yaml_source  file and --set → values with their lines
    keys         the keys, their types, and value → declared type (keys.toml, library_keys.json)
    settings     this toolkit's own keys; `RunConfig`
    builder      sections, unknown keys, errors and notices
    old_names    keys of older versions
    rules        defaults, keys without support, impossible combinations
    deepspeed    DeepSpeed's JSON file
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_edge_ft.config.builder import GENERATION, PEFT, TRAINING, ConfigBuilder
from glm_edge_ft.config.keys import PEFT_TYPES, library_keys, nearest, shown
from glm_edge_ft.config.old_names import move_into_sections, translate_old_names
from glm_edge_ft.config.rules import apply_rules
from glm_edge_ft.config.settings import DATA_KEYS, SECTIONS, TOP_KEYS, DataConfig, RunConfig
from glm_edge_ft.config.yaml_source import read_yaml
from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.files import DATA_SUFFIXES, did_you_mean, expand_home

__all__ = ["ConfigError", "DataConfig", "RunConfig", "check_data_files", "load_config"]


class ConfigError(UserError):
    """Errors in a config, with what of it can be read nevertheless, so that the files it names are checked as well.

    Attributes:
        data_config: the data files; None where `train_file` cannot be read.
        output_dir: the output folder, `~` expanded; None where it cannot be read.
    """

    def __init__(self, builder: ConfigBuilder) -> None:
        super().__init__(builder.problems)
        data, output_dir = _without_null(builder.data), builder.training.get("output_dir")
        self.data_config = DataConfig(**data) if "train_file" in data else None
        self.output_dir = expand_home(output_dir) if output_dir else None


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, lay `--set` options over it and check it as a whole.

    Args:
        path: the YAML file.
        overrides: `KEY=VALUE` texts, the key a dotted path, the value read as YAML.

    Returns:
        The typed configuration; what was accepted but not as written is in its `notices`.

    Raises:
        ConfigError: everything that is wrong, each with file and line or `--set` option, value, and what to write.
        UserError: the file holds no mapping of keys.
    """
    builder = ConfigBuilder(path, *read_yaml(path, overrides))
    _read(builder)
    if builder.problems:
        raise ConfigError(builder)
    return RunConfig(
        path=path,
        data_config=DataConfig(**_without_null(builder.data)),
        training_args=builder.training,
        generation_config=_without_null(builder.generation),
        peft_config=builder.peft,
        notices=builder.notices,
        **_without_null(builder.top),
    )


def check_data_files(config: RunConfig | DataConfig | None, data_dir: Path) -> list[Problem]:
    """Return what is wrong with the data files that a config names: missing, a folder, or of an unknown format.

    With None, where no file name could be read, the folder alone is checked.
    """
    where = str(data_dir)
    if not data_dir.exists():
        fix = f"{did_you_mean(data_dir)}DATA_DIR is the folder that holds data_config.train_file"
        return [Problem(where, "no such data folder", fix)]
    if not data_dir.is_dir():
        return [Problem(where, "this is a file, not a folder", f"write {data_dir.parent} as DATA_DIR")]
    if config is None:
        return []
    data = config.data_config if isinstance(config, RunConfig) else config
    files = {"train_file": data.train_file, "val_file": data.val_file, "test_file": data.test_file}
    found = [_check_data_file(data_dir, f"data_config.{key}", name) for key, name in files.items() if name is not None]
    return [problem for problem in found if problem is not None]


def _check_data_file(data_dir: Path, key: str, name: str) -> Problem | None:
    path = data_dir / expand_home(name)
    hint = "" if path.exists() else did_you_mean(expand_home(name), data_dir)
    if path.suffix.lower() not in DATA_SUFFIXES:
        return Problem(key, f"{shown(name)} has an unknown format", f"{hint}use one of {', '.join(DATA_SUFFIXES)}")
    if path.is_file():
        return None
    if path.exists():
        kind = "a folder" if path.is_dir() else "a pipe or a device, and a data file is read more than once"
        return Problem(key, f"{path} is {kind}", "name a file")
    present = sorted(found.name for found in data_dir.iterdir() if found.suffix.lower() in DATA_SUFFIXES)
    close = nearest(name, present)
    hint = hint or (f"did you mean {close}? " if close else "")
    return Problem(key, f"no such file {path}", f"{hint}data files there: {', '.join(present[:10]) or 'none'}")


def _read(builder: ConfigBuilder) -> None:
    """Read every section and apply every rule; errors are noted in the builder."""
    move_into_sections(builder)
    translate_old_names(builder)
    top = {key: value for key, value in builder.values.items() if key not in SECTIONS}
    builder.top = builder.read_section((), top, TOP_KEYS)
    builder.data = builder.read_section(("data_config",), builder.raw_section(("data_config",)), DATA_KEYS)
    if not builder.is_set("data_config", "train_file"):
        builder.refuse(("data_config", "train_file"), "missing", "write train_file: train.jsonl or so")
    training = builder.raw_section(TRAINING)
    training.pop("generation_config", None)
    builder.training = builder.read_section(TRAINING, training, library_keys("training_args"))
    builder.generation = builder.read_section(
        GENERATION, builder.raw_section(GENERATION), library_keys("generation_config")
    )
    builder.peft = _read_peft(builder)
    apply_rules(builder)


def _read_peft(builder: ConfigBuilder) -> dict[str, Any] | None:
    raw, path = builder.raw_section(PEFT), (*PEFT, "peft_type")
    if builder.values.get("peft_config") is None:
        return None
    if isinstance(raw.get("task_type"), str):
        raw["task_type"] = raw["task_type"].upper()
    written = raw.pop("peft_type", None)
    kind = written.strip().upper().replace("-", "_") if isinstance(written, str) else ""
    if kind not in PEFT_TYPES:
        close = nearest(kind, PEFT_TYPES)
        fix = "write peft_type: LORA or PREFIX_TUNING, or drop peft_config for full fine-tuning"
        what = f"{shown(written)} is not supported" if builder.is_set(*path) else "missing"
        if not builder.is_set(*path) or isinstance(builder.values["peft_config"], dict):
            builder.refuse(path, what, f"did you mean {close}? {fix}" if close else fix)
        return builder.read_section(PEFT, raw, {**library_keys("PREFIX_TUNING"), **library_keys("LORA")})
    known = library_keys(kind)
    other = next(library_keys(peft_type) for peft_type in PEFT_TYPES if peft_type != kind)
    for name in [name for name in raw if name in other and name not in known]:
        del raw[name]
        builder.refuse((*PEFT, name), f"`{name}` is not a key of {kind}", "leave it out, or change peft_type")
    return {"peft_type": kind, **builder.read_section(PEFT, raw, known)}


def _without_null(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}
