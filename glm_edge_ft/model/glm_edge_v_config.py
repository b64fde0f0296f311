"""The configuration of GLM-Edge-V: read from a released `config.json`, and written so that other tools still read it.

A released vision checkpoint has `model_type: "glm"`, as the chat models do, and differs from them by `vision_config`,
`boi_token_id`, `eoi_token_id` and `auto_map`. `AutoConfig` reads it as a plain `GlmConfig`, and `AutoModelForCausalLM`
then silently loads the language part alone: ask `is_vision_config` first. Nothing is registered with the Auto classes
here, so plain GLM models are loaded as usual.

Sources for fields and values: THUDM/GLM-Edge, and transformers' `GlmConfig` and `SiglipVisionConfig`.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from transformers import GlmConfig, PretrainedConfig, SiglipVisionConfig

from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.model.weight_files import list_weight_files, read_shapes

RELEASED_ARCHITECTURES = ["GlmForCausalLM"]
CONVOLUTION_STRIDE = 2  # the adapter's convolution turns 2 x 2 patches into one image token
BOUNDARY_KEYS = ("model.vision.adapter.boi", "model.vision.adapter.eoi")
LM_HEAD_KEY = "lm_head.weight"
VISION_PREFIX = "model.vision."  # of every module and weight of tower and adapter

_REQUIRED_VISION_FIELDS = (
    "hidden_size",
    "image_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
)
_OPTIONAL_VISION_FIELDS = ("num_channels", "hidden_act", "layer_norm_eps", "attention_dropout")
_OWN_CONFIG = "use the config.json that came with the checkpoint"


class GlmEdgeVConfig(GlmConfig):
    """`GlmConfig` with the fields of the vision part.

    Attributes:
        vision_config: the tower's fields as the checkpoint has them, kept unchanged; `siglip_config` reads them.
        boi_token_id: the id of the image placeholder, `<|begin_of_image|>`.
        eoi_token_id: the id of `<|end_of_image|>`; no released template uses it.
        boundary_shape: the shape in which the checkpoint stores boi and eoi; None: `(1, 1, hidden)`. Never written to
            `config.json`, since the stored tensors say it.
    """

    vision_config: dict[str, Any] | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    boundary_shape: tuple[int, ...] | None = None

    @property
    def patches_per_side(self) -> int:
        """The side of the tower's square grid of patches: 48 for the released models."""
        fields = self.vision_config or {}
        return int(fields["image_size"]) // int(fields["patch_size"])

    @property
    def tokens_per_image(self) -> int:
        """How many vectors, and so placeholders, one image takes: 24 x 24 + 2 = 578 for the released models."""
        return (self.patches_per_side // CONVOLUTION_STRIDE) ** 2 + 2

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields for `config.json`: those of today's transformers and those of the released files."""
        fields = super().to_diff_dict()
        fields.pop("boundary_shape", None)
        fields["architectures"] = list(RELEASED_ARCHITECTURES)  # saving puts the name of the Python class there
        return fields | release_fields(fields)


def release_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of 2024 for a GLM's `config.json`, from today's.

    transformers 5 keeps rotary settings in `rope_parameters` and the format in `dtype`. Tools of the time of the
    release read `rope_theta`, `partial_rotary_factor` and `torch_dtype`; without the second they silently rotate half
    of each head. Where both are written, transformers 5 takes its own.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    fields = {
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "torch_dtype": config.get("dtype"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def is_vision_config(config: PretrainedConfig) -> bool:
    """Return whether `config`, of whatever class, is that of a vision checkpoint: whether it has `vision_config`."""
    return config.to_dict().get("vision_config") is not None


def siglip_config(config: GlmEdgeVConfig, where: str = "config.json") -> SiglipVisionConfig:
    """Return the tower's config, without the pooling head, which GLM-Edge-V does not use.

    Raises UserError naming each field that is missing: transformers would use the sizes of another model.
    """
    fields = config.vision_config or {}
    problems = ProblemList()
    for name in _REQUIRED_VISION_FIELDS:
        if not isinstance(fields.get(name), int):
            what = f"must be a whole number, but is {fields.get(name)!r}"
            problems.add(f"{where}: vision_config.{name}", what, _OWN_CONFIG)
    problems.raise_if_any()
    chosen = {name: fields[name] for name in (*_REQUIRED_VISION_FIELDS, *_OPTIONAL_VISION_FIELDS) if name in fields}
    return SiglipVisionConfig(**chosen, vision_use_head=False)


def read_glm_edge_v_config(folder: str | Path) -> GlmEdgeVConfig:
    """Return the config of a vision checkpoint in a folder, completed by what only its weight files say.

    Two facts come from the headers of the weight files that are there: the shape of boi and eoi, and whether a separate
    `lm_head.weight` is stored (then the config's `tie_word_embeddings: true` is wrong and set to false).

    Raises:
        UserError: the config or the index of weight files cannot be read, the config has no `vision_config`, lacks a
            field of it or `boi_token_id`, or boi or eoi does not hold `hidden_size` numbers.
    """
    where, folder = f"MODEL {folder}", Path(folder)
    try:
        if not (folder / "config.json").is_file():  # transformers would take its defaults
            raise OSError("there is no config.json")
        config: Any = GlmEdgeVConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError.single(where, f"its config cannot be read: {error}", "download the model again") from error
    if not is_vision_config(config):
        what = "is no vision model (its config has no vision_config)"
        raise UserError.single(where, what, "use finetune.py for chat models")
    siglip_config(config, where=f"{where}: config.json")
    if not isinstance(config.boi_token_id, int):
        what = f"must be the id of the image placeholder, but is {config.boi_token_id!r}"
        raise UserError.single(f"{where}: config.json: boi_token_id", what, _OWN_CONFIG)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in list_weight_files(where, folder):
        with contextlib.suppress(OSError, ValueError):  # reported by `check_weights` and on loading
            shapes |= read_shapes(folder / name)
    for key in BOUNDARY_KEYS:
        if math.prod(shapes.get(key, (config.hidden_size,))) != config.hidden_size:
            what = f"has the shape {shapes[key]}, but must hold hidden_size = {config.hidden_size} numbers"
            raise UserError.single(f"{where}: {key}", what, "download the model again")
    config.boundary_shape = shapes.get(BOUNDARY_KEYS[0])
    if LM_HEAD_KEY in shapes:
        config.tie_word_embeddings = False
    return config
