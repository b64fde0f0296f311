"""A model's weights as the tensors of GGUF files, with the keys of their architectures.

llama.cpp computes GLM-Edge as its architecture `chatglm`, and the vision part of a GLM-Edge-V, a file of its own
(`mmproj`), as `clip` with the projector `adapter`. Its `chatglm` expects heads that are together as wide as the hidden
states, as those of the released models are. Where they are wider (the embedded models), the hidden states are padded
with zeros to that width, which leaves every result as it is.

No key can set these differences of the vision part: llama.cpp computes the adapter's GELU by its tanh form, takes the
tower's epsilon for the adapter's norm, and puts an image that is not square in the middle of the square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape, quantize
from transformers import PreTrainedModel

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.glm_edge_v_config import VISION_PREFIX, GlmEdgeVConfig, siglip_config

_TOWER = f"{VISION_PREFIX}vit.model."
_ADAPTER = f"{VISION_PREFIX}adapter."
_LARGEST_F16 = 65504.0
_NORMS = ("norm", "input_layernorm", "post_attention_layernorm")
# The axis of a weight `(out, in)`, or of a norm, that is as wide as the hidden states.
_HIDDEN_AXIS = {
    **dict.fromkeys(("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_up_proj"), 1),
    **dict.fromkeys(("o_proj", "down_proj", *_NORMS), 0),
}
_VISION_AS_WIDE_AS_TEXT = ("adapter.boi", "adapter.eoi", "adapter.linear.dense_4h_to_h.weight")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        key: in the model.
        shape: as numpy has it, `(out, in)`; larger than the model's where it is padded.
        kind: its number format.
        scale: the model's numbers are multiplied by it.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(quant_shape_to_byte_shape(self.shape, self.kind))


def check_computation(where: str, config: Any) -> None:
    """Raise UserError for a model that llama.cpp would compute in another way than transformers does."""
    if config.model_type != "glm":
        fix = "llama.cpp's convert_hf_to_gguf.py writes other models, from a folder that `merge` made"
        raise UserError.single(where, f"is of the type {config.model_type}, not a GLM-Edge", fix)
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type != "default":
        raise UserError.single(where, f"its positions are scaled ({rope_type}), which is not written here")
    if config.hidden_act != "silu":
        what = f"its hidden_act is {config.hidden_act!r}; llama.cpp computes GLM-Edge with 'silu'"
        raise UserError.single(where, what)
    if padded_hidden_size(config) < config.hidden_size:
        what = f"its {config.num_attention_heads} heads of {config.head_dim} are together less wide than its "
        what += f"hidden states ({config.hidden_size}), which llama.cpp's chatglm cannot have"
        raise UserError.single(where, what)


def padded_hidden_size(config: Any) -> int:
    """Return how wide the hidden states are in a file: as wide as the heads together."""
    width: int = config.num_attention_heads * config.head_dim
    return width


def add_language_keys(writer: GGUFWriter, config: Any) -> None:
    """Write the keys of the language part."""
    rope, hidden_size = config.rope_parameters, padded_hidden_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    # The mean of squares that a norm divides by gets smaller by the padding.
    writer.add_layer_norm_rms_eps(config.rms_norm_eps * (config.hidden_size / hidden_size))
    writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def add_vision_keys(writer: GGUFWriter, config: Any, image_processor: Any) -> None:
    """Write the keys of the vision part."""
    tower: Any = siglip_config(config)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("adapter")
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(tower.num_hidden_layers)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_projection_dim(padded_hidden_size(config))
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_image_mean([float(value) for value in image_processor.image_mean])
    writer.add_vision_image_std([float(value) for value in image_processor.image_std])


def plan_language_tensors(model: PreTrainedModel, kind: GGMLQuantizationType) -> list[PlannedTensor]:
    """Return the tensors of the language part, in the model's order; weights on the meta device will do.

    Args:
        model: a GLM, or a GLM-Edge-V, whose vision part is left out.
        kind: the format of matrices; norms and biases are written in float32, as llama.cpp wants them.
    """
    config: Any = model.config
    hidden_size = padded_hidden_size(config)
    names = get_tensor_name_map(MODEL_ARCH.CHATGLM, config.num_hidden_layers)
    planned = []
    for key, weight in model.state_dict().items():
        if key.startswith(VISION_PREFIX) or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue
        module, shape = key.split(".")[-2], list(weight.shape)
        if (axis := _HIDDEN_AXIS[module]) < len(shape):  # a bias of q_proj, k_proj or v_proj has none
            shape[axis] = hidden_size
        scale = (config.hidden_size / hidden_size) ** 0.5 if module in _NORMS else 1.0
        name = _look_up(names, key)
        planned.append(PlannedTensor(name, key, tuple(shape), _format_for(tuple(shape), kind), scale))
    return planned


def plan_vision_tensors(model: PreTrainedModel, kind: GGMLQuantizationType) -> list[PlannedTensor]:
    """Return the tensors of the vision part, none of a chat model; `kind` is the format of matrices."""
    config = model.config
    if not isinstance(config, GlmEdgeVConfig):
        return []
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, siglip_config(config).num_hidden_layers)
    planned = []
    for key, weight in model.state_dict().items():
        if key.startswith(_ADAPTER):
            part = key.removeprefix(_ADAPTER)
            name = f"adapter.{part.replace('linear_proj', 'linear').replace('gate_proj', 'gate')}"
        elif key.startswith(_TOWER):
            name = _look_up(names, f"vision_tower.{key.removeprefix(_TOWER)}")
        else:
            continue
        shape = tuple(weight.shape) if weight.dim() != 3 else (weight.shape[-1],)  # boi and eoi are (1, 1, hidden)
        if name in _VISION_AS_WIDE_AS_TEXT:
            shape = (padded_hidden_size(config), *shape[1:])
        form = _format_for(shape, kind)
        if name.startswith("v.position_embd"):  # llama.cpp adds positions in f32
            form = GGMLQuantizationType.F32
        elif len(shape) > 2 and kind != GGMLQuantizationType.F32:  # and convolves in f32 or f16 alone
            form = GGMLQuantizationType.F16
        planned.append(PlannedTensor(name, key, shape, form))
    return planned


def _look_up(names: TensorNameMap, key: str) -> str:
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ValueError(f"GGUF has no name for {key}")
    return name


def _format_for(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return a tensor's format: `kind` for matrices, f16 where its blocks do not fit their rows, else float32."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def write_file(
    writer: GGUFWriter, planned: list[PlannedTensor], weights: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Write the keys that the writer has, and the planned tensors; one of them at a time is held in its new format.

    Raises UserError for numbers that a format cannot hold.
    """
    for tensor in planned:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in planned:
        numbers = _read_numbers(tensor, weights[tensor.key])
        writer.write_tensor_data(np.ascontiguousarray(quantize(numbers, tensor.kind)))
    writer.close()


def _read_numbers(tensor: PlannedTensor, weight: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a weight in float32, scaled and padded with zeros to the planned shape."""
    numbers = weight.detach().float().numpy()
    largest = float(np.abs(numbers).max(initial=0.0)) * tensor.scale
    if not np.isfinite(largest):
        raise UserError.single(tensor.key, "holds numbers that are not finite", "the training failed: use another")
    if tensor.kind == GGMLQuantizationType.F16 and largest > _LARGEST_F16:
        what = f"holds the number {largest:.4g}, and f16 ends at {_LARGEST_F16:.0f}"
        raise UserError.single(tensor.key, what, "write --type bf16 or f32")
    if tensor.scale != 1:
        numbers = numbers * np.float32(tensor.scale)
    numbers = numbers.reshape(numbers.shape[-len(tensor.shape) :])
    missing = np.subtract(tensor.shape, numbers.shape)
    return np.pad(numbers, [(0, int(count)) for count in missing]) if missing.any() else numbers
