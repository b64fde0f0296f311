"""The configuration of GLM-Edge-V: read from a released `config.json`, and written so that other tools still read it.

A released vision checkpoint calls itself `model_type: "glm"`, as the chat models do, and differs from them by
`vision_config`, `boi_token_id`, `eoi_token_id` and `auto_map`. `AutoConfig` reads it as a plain `GlmConfig`, and
`AutoModelForCausalLM` then loads the language part alone without a word: ask `is_vision_config` first. Nothing is
registered with the Auto classes here, so plain GLM models go on as before.

Sources for fields and values: THUDM/GLM-Edge, and transformers' `GlmConfig` and `SiglipVisionConfig`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GlmConfig, PretrainedConfig, SiglipVisionConfig
from transformers.utils import cached_file

from glm_edge_ft.errors import ProblemList, UserError

RELEASED_ARCHITECTURES = ["GlmForCausalLM"]
CONVOLUTION_STRIDE = 2  # the adapter's convolution turns 2 x 2 patches into one image token
BOUNDARY_RANK = 3  # of boi and eoi, (1, 1, hidden), where no checkpoint says otherwise
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
        """Return the fields for `config.json`: those of today's transformers and those of the released files.

        Today's transformers keeps the rotary settings in `rope_parameters` and the format in `dtype`. Tools of the
        time of the release look for `rope_theta`, `partial_rotary_factor` and `torch_dtype`, and where the second is
        missing they rotate half of each head only, without a word. Where both are written, transformers takes its own.
        """
        fields = super().to_diff_dict()
        fields.pop("boundary_shape", None)
        fields["architectures"] = list(RELEASED_ARCHITECTURES)  # saving puts the name of the Python class there
        rope: Any = self.rope_parameters or {}
        fields["rope_theta"] = rope.get("rope_theta", 10000.0)
        fields["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
        if fields.get("dtype") is not None:
            fields["torch_dtype"] = fields["dtype"]
        return fields


def is_vision_config(config: PretrainedConfig) -> bool:
    """Return whether `config`, of whatever class, is that of a vision checkpoint: whether it has `vision_config`."""
    return getattr(config, "vision_config", None) is not None


def siglip_config(config: GlmEdgeVConfig, where: str = "config.json") -> SiglipVisionConfig:
    """Return the tower's config, without the pooling head, which GLM-Edge-V does not use.

    Raises UserError naming each field that is missing: transformers would put the sizes of another model in its place.
    """
    fields = config.vision_config or {}
    problems = ProblemList()
    for name in _REQUIRED_VISION_FIELDS:
        if not isinstance(fields.get(name), int):
            problems.add(
                f"{where}: vision_config.{name}",
                f"must be a whole number, but is {fields.get(name)!r}",
                "use the config.json that came with the checkpoint",
            )
    problems.raise_if_any()
    chosen = {name: fields[name] for name in (*_REQUIRED_VISION_FIELDS, *_OPTIONAL_VISION_FIELDS) if name in fields}
    return SiglipVisionConfig(**chosen, vision_use_head=False)


def read_glm_edge_v_config(source: str | Path, download_weights: bool = False) -> GlmEdgeVConfig:
    """Return the config of a vision checkpoint, completed by what only its weight files say.

    Two facts come from the headers of the weight files, where these are at hand: the shape of boi and eoi, and whether
    a separate `lm_head.weight` is stored (then the config's `tie_word_embeddings: true` is wrong and set to false).

    Args:
        source: a folder, or a hub id.
        download_weights: fetch the weight files of a hub id to read their headers; otherwise cached ones only.

    Raises:
        UserError: the config or a weight file cannot be read, the config has no `vision_config`, lacks a field of it
            or `boi_token_id`, or boi or eoi does not hold `hidden_size` numbers.
    """
    where = f"MODEL {source}"
    try:
        if _find_file(str(source), "config.json", download=True) is None:  # transformers would take its defaults
            raise OSError("there is no config.json, neither here nor within reach on the hub")
        config: Any = GlmEdgeVConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError.single(where, f"its config cannot be read: {error}", "download the model again") from error
    if not is_vision_config(config):
        raise UserError.single(
            where, "is no vision model (its config has no vision_config)", "use finetune.py for chat models"
        )
    siglip_config(config, where=f"{where}: config.json")
    if not isinstance(config.boi_token_id, int):
        raise UserError.single(
            f"{where}: config.json: boi_token_id",
            f"must be the id of the image placeholder, but is {config.boi_token_id!r}",
            "use the config.json that came with the checkpoint",
        )
    try:
        shapes = _stored_shapes(str(source), (*BOUNDARY_KEYS, LM_HEAD_KEY), download_weights)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError.single(where, f"its weights cannot be read: {error}", "download the model again") from error
    for key in BOUNDARY_KEYS:
        if key in shapes and math.prod(shapes[key]) != config.hidden_size:
            raise UserError.single(
                f"{where}: {key}",
                f"has the shape {shapes[key]}, but must hold hidden_size = {config.hidden_size} numbers",
                "download the model again",
            )
    config.boundary_shape = shapes.get(BOUNDARY_KEYS[0])
    if LM_HEAD_KEY in shapes:
        config.tie_word_embeddings = False
    return config


def _stored_shapes(source: str, keys: tuple[str, ...], download: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those of `keys` that the safetensors files of a checkpoint hold; reads headers only."""
    index = _find_file(source, "model.safetensors.index.json", download)
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = {key: weight_map[key] for key in keys if key in weight_map}
    else:
        names = dict.fromkeys(keys, "model.safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(names.values())):
        path = _find_file(source, name, download)
        if path is None:
            continue
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            for key in keys:
                if key in stored:
                    shapes[key] = tuple(file.get_slice(key).get_shape())
    return shapes


def _find_file(source: str, name: str, download: bool) -> str | None:
    for local_files_only in (True, False) if download else (True,):  # what is cached is not asked for again
        path = cached_file(
            source,
            name,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            return path
    return None
