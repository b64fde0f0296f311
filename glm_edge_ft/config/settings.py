"""The settings of a run: this toolkit's own keys, each with its meaning, and the sections of the libraries.

The descriptions are the reference of `configs/README.md`, whose table `python -m tests.write_config_docs` writes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from glm_edge_ft.config.keys import Key, Switch, Text, Whole

SECTIONS = ("data_config", "training_args", "peft_config")
Count = Annotated[Whole, Field(ge=1)]
_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """The data of a run; file names are relative to DATA_DIR."""

    train_file: Text
    """conversations to train on, inside `DATA_DIR`"""
    val_file: Text | None = None
    """conversations to evaluate on during training; `null` switches evaluation off"""
    test_file: Text | None = None
    """conversations to predict after training; `null` skips that"""
    num_proc: Count = 1
    """processes that encode the data; pays off from some 10,000 rows on"""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything that the config file and `--set` state about a run."""

    path: Path
    """the file that it was read from"""
    data_config: DataConfig
    """the data files"""
    max_input_length: Count = 512
    """most tokens of a prompt, see below; an image turn of GLM-Edge-V takes 584 of them"""
    max_output_length: Count = 512
    """most tokens of a reply, its stop token included"""
    freezeV: Switch = False  # noqa: N815, RUF100  (the guide's spelling)
    """freezes tower and adapter of a vision model; no effect on chat models"""
    training_args: dict[str, Any] = Field(default_factory=dict)
    """arguments of `Seq2SeqTrainingArguments` under today's names, without `generation_config`"""
    generation_config: dict[str, Any] = Field(default_factory=dict)
    """arguments of `GenerationConfig`"""
    peft_config: dict[str, Any] | None = None
    """arguments of PEFT's config, `peft_type` LORA or PREFIX_TUNING; `null`: full fine-tuning"""
    max_images: Count = 1
    """most images of a conversation; the released vision models take one"""
    on_bad_image: Literal["error", "skip"] = "error"
    """a row whose image cannot be opened: `error` ends the run before training, `skip` leaves the row out"""
    image_placeholder_tokens: Count | None = None
    """placeholder tokens of an image, where a template differs from the released ones; `null`: the checkpoint's, 578"""
    cache_image_features: Switch = True
    """keeps the features of each image on disk during the run, where the vision part is frozen"""
    max_tokens_per_pass: Count | None = None
    """most tokens, padding included, in one pass of training: a larger batch is split, with the same gradients; `null`:
    2,048 on a CPU, on a GPU the whole batch; not under DeepSpeed"""
    padding_free: Switch = False
    """packs the conversations of a training batch into one row without padding, and none sees another, see below; not
    with `PREFIX_TUNING`"""
    on_nonfinite_loss: Literal["stop", "warn"] = "stop"
    """at a loss or gradient that is NaN or infinite `stop` ends the run, `warn` skips steps with such a gradient; under
    DeepSpeed `stop` alone"""
    quantization: Literal["nf4", "none"] | None = None
    """`nf4` loads the linear layers of the frozen base model in 4 bits, see below; needs `peft_config` and
    bitsandbytes; `null`: unquantized"""
    notices: tuple[str, ...] = ()
    """one line each, for the caller to print: old names, keys without effect"""

    def resolved(self) -> dict[str, Any]:
        """Return the whole in the layout of the YAML file, so that it can be read as a config again.

        A hub token is replaced by a placeholder.
        """
        values = copy.deepcopy({name: vars(self)[name] for name in (*TOP_KEYS, "training_args", "peft_config")})
        values["training_args"]["generation_config"] = copy.deepcopy(self.generation_config)
        if values["training_args"].get("hub_token"):
            values["training_args"]["hub_token"] = "<hub_token>"
        return {"data_config": dataclasses.asdict(self.data_config), **values}


def _keys(fields: Mapping[str, FieldInfo], *left_out: str) -> dict[str, Key]:
    keys = {}
    for name in [name for name in fields if name not in left_out]:
        info = fields[name]
        kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        default = None if info.is_required() else info.default
        keys[name] = Key(
            kind if info.is_required() else kind | None, default, description=" ".join((info.description or "").split())
        )
    return keys


DATA_KEYS = _keys(DataConfig.__pydantic_fields__)  # type: ignore[attr-defined]
_NOT_TOP = ("path", "generation_config", "notices", *SECTIONS)
TOP_KEYS = _keys(RunConfig.__pydantic_fields__, *_NOT_TOP)  # type: ignore[attr-defined]
