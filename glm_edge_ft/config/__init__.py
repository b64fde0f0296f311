"""One YAML file → one typed, strict `RunConfig`, or every mistake in it at once.

The keys are those of the fine-tuning guide: `data_config`, `max_input_length`, `max_output_length`, `freezeV`,
`training_args` (what `Seq2SeqTrainingArguments` takes, with `generation_config` inside), `peft_config` (what PEFT's
LORA and PREFIX_TUNING take); and this toolkit's own: `max_images`, `on_bad_image`, `image_placeholder_tokens`,
`cache_image_features`, `max_tokens_per_pass`, `padding_free`, `on_nonfinite_loss`, `quantization`. Nothing heavy is
imported here: a mistake shows at once.

    yaml_file    file and --set → values with their lines
    schema       what the installed libraries accept
    names        old and mistyped names
    values       value → declared type
    ranges       numbers that make sense
    unsupported  what the libraries know and this toolkit does not use
    rules        defaults, impossible combinations
    quantization what can stand beside a base model in 4 bits
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from glm_edge_ft.config.document import KeyPath, nearest
from glm_edge_ft.config.draft import PEFT, TRAINING, Draft
from glm_edge_ft.config.names import (
    DATA_FIELDS,
    SECTIONS,
    TOP_FIELDS,
    move_into_sections,
    refuse_unknown,
    translate_old_names,
)
from glm_edge_ft.config.quantization import check_quantization
from glm_edge_ft.config.ranges import check_ranges
from glm_edge_ft.config.rules import apply_training_rules, check_padding_free, check_peft, check_peft_type
from glm_edge_ft.config.schema import PEFT_TYPES, Field, generation_fields, peft_fields, training_fields
from glm_edge_ft.config.values import Mismatch, coerce, shown
from glm_edge_ft.config.yaml_file import read_document
from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.files import DATA_SUFFIXES, did_you_mean, expand_home


@dataclass(frozen=True)
class DataConfig:
    """The data of a run; file names are relative to DATA_DIR.

    Attributes:
        train_file: conversations to train on.
        val_file: conversations to evaluate on during training; None switches evaluation off.
        test_file: conversations to predict after training; None skips that.
        num_proc: processes that encode the data.
    """

    train_file: str
    val_file: str | None = None
    test_file: str | None = None
    num_proc: int = 1


@dataclass(frozen=True)
class RunConfig:
    """Everything that the config file and `--set` say about a run.

    Attributes:
        path: the file it came from.
        data_config: the data files.
        max_input_length: tokens of a prompt that are kept.
        max_output_length: tokens of a reply that are kept.
        freezeV: whether tower and adapter of a vision model stay as they are; without meaning for a chat model.
        max_images: most images of a conversation; the released vision models take one.
        on_bad_image: what a row does whose image cannot be opened: stop the run, or be left out.
        image_placeholder_tokens: placeholder tokens of an image, where it is not what the checkpoint's geometry says.
        cache_image_features: whether a vision part that stays as it is sees each image once, and its vectors are kept
            on disk until the run has ended.
        max_tokens_per_pass: most tokens, padding included, that go through the model at once; None: what suits the
            machine.
        padding_free: whether the rows of a training batch stand one behind another, without padding.
        training_args: keyword arguments of `Seq2SeqTrainingArguments` under today's names, without
            `generation_config`; bf16 and fp16 are absent unless the file sets them.
        generation_config: keyword arguments of `GenerationConfig`; empty when nothing is set.
        peft_config: keyword arguments of PEFT's config, `peft_type` LORA or PREFIX_TUNING; None means full fine-tuning.
        on_nonfinite_loss: what a loss that is not finite does: stop the run, or warn and go on.
        quantization: form in which the base model's linear layers are kept: `nf4`, in 4 bits; None: as plain numbers.
        notices: one line each, to be printed by the caller: old names, switches that were turned.
    """

    path: Path
    data_config: DataConfig
    max_input_length: int
    max_output_length: int
    freezeV: bool  # noqa: N815, RUF100  (the guide's spelling)
    training_args: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    peft_config: dict[str, Any] | None = None
    max_images: int = 1
    on_bad_image: Literal["error", "skip"] = "error"
    image_placeholder_tokens: int | None = None
    cache_image_features: bool = True
    max_tokens_per_pass: int | None = None
    padding_free: bool = False
    on_nonfinite_loss: Literal["stop", "warn"] = "stop"
    quantization: Literal["nf4"] | None = None
    notices: tuple[str, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """Return the whole as plain data in the layout of the YAML file, so that it can be read as a config again.

        A hub token is replaced by a placeholder.
        """
        training = copy.deepcopy(self.training_args)
        if training.get("hub_token"):
            training["hub_token"] = "<hub_token>"
        return {
            "data_config": asdict(self.data_config),
            "max_input_length": self.max_input_length,
            "max_output_length": self.max_output_length,
            "freezeV": self.freezeV,
            "max_images": self.max_images,
            "on_bad_image": self.on_bad_image,
            "image_placeholder_tokens": self.image_placeholder_tokens,
            "cache_image_features": self.cache_image_features,
            "max_tokens_per_pass": self.max_tokens_per_pass,
            "padding_free": self.padding_free,
            "on_nonfinite_loss": self.on_nonfinite_loss,
            "quantization": self.quantization,
            "training_args": {**training, "generation_config": copy.deepcopy(self.generation_config)},
            "peft_config": copy.deepcopy(self.peft_config),
        }


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, lay `--set` options over it and check it as a whole.

    Args:
        path: the YAML file.
        overrides: `KEY=VALUE` texts, the key a dotted path, the value read as YAML.

    Returns:
        The typed configuration; what was accepted but not as written is in its `notices`.

    Raises:
        UserError: everything that is wrong, each with file and line or `--set` option, value, and what to write.
    """
    draft = _checked_draft(path, overrides)
    draft.raise_if_any()
    return _finish(draft, path)


def peek(path: Path, overrides: Sequence[str] = ()) -> tuple[DataConfig | None, Path | None]:
    """Return what can be read of a config that may hold mistakes, so that the files it names can be checked as well.

    Args:
        path, overrides: as for `load_config`, whose error lists the mistakes.

    Returns:
        The data files and the output folder (`~` expanded, perhaps not there yet), each None where it cannot be
        read. A mistyped `val_file`, `test_file` or `num_proc` is as if it were not written. Nothing is raised.
    """
    try:
        draft = _checked_draft(path, overrides)
    except UserError:
        return None, None
    data = _set_values(draft.data)
    output_dir = draft.training.get("output_dir")
    return (
        DataConfig(**data) if "train_file" in data else None,
        expand_home(output_dir) if output_dir else None,
    )


def _checked_draft(path: Path, overrides: Sequence[str]) -> Draft:
    """Read a config and hold every rule, mistakes noted in the draft; raise UserError where the file is no mapping."""
    draft = Draft(read_document(path, overrides))
    move_into_sections(draft)
    translate_old_names(draft)
    values = draft.document.values
    top_fields = {**TOP_FIELDS, **{name: Field(name, "Any", (), None) for name in SECTIONS}}
    draft.top = _read_section(
        draft, (), {key: value for key, value in values.items() if key not in SECTIONS}, top_fields
    )
    draft.data = _read_section(draft, ("data_config",), _section(draft, ("data_config",)), DATA_FIELDS)
    if not draft.wrote("data_config", "train_file"):
        draft.refuse(("data_config", "train_file"), "missing", "write train_file: train.jsonl or so")
    _read_training(draft)
    _read_peft(draft)
    check_ranges(draft)
    check_peft(draft)
    apply_training_rules(draft)
    check_padding_free(draft)
    check_quantization(draft)
    return draft


def check_data_files(config: RunConfig | DataConfig | None, data_dir: Path) -> list[Problem]:
    """Return what is wrong with the data files that a config names: missing, a folder, or of an unknown format.

    Of a config that holds mistakes, what `peek` could read is enough; with None the folder alone is checked.
    """
    where = str(data_dir)
    if not data_dir.exists():
        fix = f"{did_you_mean(data_dir)}DATA_DIR is the folder that holds data_config.train_file"
        return [Problem(where, "no such data folder", fix)]
    if not data_dir.is_dir():
        return [Problem(where, "this is a file, not a folder", f"write {data_dir.parent} as DATA_DIR")]
    data_config = config.data_config if isinstance(config, RunConfig) else config
    problems = []
    for key in ("train_file", "val_file", "test_file"):
        name = getattr(data_config, key, None)
        if name is not None:
            problems += _check_data_file(data_dir, f"data_config.{key}", name)
    return problems


def _check_data_file(data_dir: Path, key: str, name: str) -> list[Problem]:
    path = data_dir / expand_home(name)
    if path.suffix.lower() not in DATA_SUFFIXES:
        hint = "" if path.exists() else did_you_mean(expand_home(name), data_dir)
        return [Problem(key, f"{shown(name)} has an unknown format", f"{hint}use one of {', '.join(DATA_SUFFIXES)}")]
    if path.is_file():
        return []
    if path.is_dir():
        return [Problem(key, f"{path} is a folder", "name a file in it")]
    if path.exists():
        return [Problem(key, f"{path} is a pipe or a device, and a data file is read more than once", "name a file")]
    present = sorted(found.name for found in data_dir.iterdir() if found.suffix.lower() in DATA_SUFFIXES)
    close = nearest(name, present)
    hint = did_you_mean(expand_home(name), data_dir) or (f"did you mean {close}? " if close else "")
    listing = f"data files there: {', '.join(present[:10])}" if present else "the folder holds no data files"
    return [Problem(key, f"no such file {path}", hint + listing)]


def _section(draft: Draft, path: KeyPath) -> dict[str, Any]:
    """Return the raw keys of a section; an absent or null one is empty, another kind of value is refused."""
    value: Any = draft.document.values
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        seen = shown(value, draft.document.texts.get(path))
        draft.refuse(path, f"{seen} is not a mapping of keys", "write its keys below it, indented by two spaces")
        return {}
    return value


def _read_section(draft: Draft, path: KeyPath, raw: Mapping[str, Any], known: Mapping[str, Field]) -> dict[str, Any]:
    """Return the typed values of a section; unknown keys and mistyped values are noted and left out."""
    typed = {}
    for key, value in raw.items():
        if key not in known:
            refuse_unknown(draft, (*path, key), known)
            continue
        try:
            typed[key] = coerce(draft.document, (*path, key), value, known[key])
        except Mismatch as mismatch:
            draft.refuse(mismatch.path, mismatch.what, mismatch.fix)
    return typed


def _read_training(draft: Draft) -> None:
    raw = dict(_section(draft, TRAINING))
    raw.pop("generation_config", None)
    draft.training = _read_section(draft, TRAINING, raw, training_fields())
    path = (*TRAINING, "generation_config")
    draft.generation = _read_section(draft, path, _section(draft, path), generation_fields())


def _read_peft(draft: Draft) -> None:
    raw = dict(_section(draft, PEFT))
    if draft.document.values.get("peft_config") is None:
        return
    kind = check_peft_type(draft, raw)
    raw.pop("peft_type", None)
    every = {name: known for peft_type in PEFT_TYPES for name, known in peft_fields(peft_type).items()}
    known = peft_fields(kind) if kind else every
    for key in [key for key in raw if key not in known and key in every]:
        del raw[key]
        other = next(peft_type for peft_type in PEFT_TYPES if peft_type != kind)
        draft.refuse((*PEFT, key), f"`{key}` is a key of {other}, not of {kind}", "leave it out, or change peft_type")
    if isinstance(raw.get("task_type"), str):
        raw["task_type"] = raw["task_type"].upper()
    typed = _read_section(draft, PEFT, raw, known)
    draft.peft = {"peft_type": kind, **typed} if kind else typed


def _set_values(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is not None}


def _finish(draft: Draft, path: Path) -> RunConfig:
    top = _set_values(draft.top)
    return RunConfig(
        path=path,
        data_config=DataConfig(**_set_values(draft.data)),
        max_input_length=top.get("max_input_length", 512),
        max_output_length=top.get("max_output_length", 512),
        freezeV=top.get("freezeV", False),
        max_images=top.get("max_images", 1),
        on_bad_image=top.get("on_bad_image", "error"),
        image_placeholder_tokens=top.get("image_placeholder_tokens"),
        cache_image_features=top.get("cache_image_features", True),
        max_tokens_per_pass=top.get("max_tokens_per_pass"),
        padding_free=top.get("padding_free", False),
        training_args=draft.training,
        generation_config=_set_values(draft.generation),
        peft_config=draft.peft,
        on_nonfinite_loss=top.get("on_nonfinite_loss", "stop"),
        quantization=top.get("quantization"),
        notices=tuple(draft.notices),
    )
