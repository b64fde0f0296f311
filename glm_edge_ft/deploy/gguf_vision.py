"""The vision part of a GLM-Edge-V as a GGUF file of its own, llama.cpp's `mmproj`: tower, adapter, boi and eoi.

llama.cpp computes it as its projector `adapter`. It differs from transformers in small things that no file can set:
GELU of the adapter by its tanh form, the epsilon of the adapter's norm as the tower's, and pictures that are not square
in the middle of the square instead of its upper left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glm_edge_ft.deploy.gguf_weights import VISION_PREFIX, PlannedTensor, file_width, format_for

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedModel

ARCHITECTURE = "clip"
_TOWER = f"{VISION_PREFIX}vit.model.vision_model."
_ADAPTER = f"{VISION_PREFIX}adapter."
_EMBEDDINGS = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "post_layernorm": "v.post_ln",
}
_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_ADAPTER_NAMES = {
    "boi": "adapter.boi",
    "eoi": "adapter.eoi",
    "conv": "adapter.conv",
    "linear_proj.linear_proj": "adapter.linear.linear",
    "linear_proj.norm1": "adapter.linear.norm1",
    "linear_proj.gate_proj": "adapter.linear.gate",
    "linear_proj.dense_h_to_4h": "adapter.linear.dense_h_to_4h",
    "linear_proj.dense_4h_to_h": "adapter.linear.dense_4h_to_h",
}
_AS_WIDE_AS_TEXT = ("adapter.boi", "adapter.eoi", "adapter.linear.dense_4h_to_h.weight")


def add_vision_settings(writer: GGUFWriter, config: Any, image_processor: Any) -> None:
    """Write the keys of the vision part."""
    from glm_edge_ft.model.glm_edge_v_config import siglip_config

    tower: Any = siglip_config(config)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "adapter")
    writer.add_bool("clip.use_gelu", True)
    for key, value in (
        ("image_size", tower.image_size),
        ("patch_size", tower.patch_size),
        ("embedding_length", tower.hidden_size),
        ("feed_forward_length", tower.intermediate_size),
        ("block_count", tower.num_hidden_layers),
        ("attention.head_count", tower.num_attention_heads),
        ("projection_dim", file_width(config).file),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", tower.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", [float(value) for value in image_processor.image_mean])
    writer.add_array("clip.vision.image_std", [float(value) for value in image_processor.image_std])


def plan_vision_tensors(model: PreTrainedModel, kind: GGMLQuantizationType) -> list[PlannedTensor]:
    """Return the tensors of the vision part, in the model's order; `kind` is the format of matrices."""
    width = file_width(model.config)
    planned = []
    for key, weight in model.state_dict().items():
        if not key.startswith(VISION_PREFIX):
            continue
        name = _name(key)
        shape = tuple(weight.shape) if weight.dim() != 3 else (weight.shape[-1],)  # boi and eoi are (1, 1, hidden)
        if name in _AS_WIDE_AS_TEXT:
            shape = (width.file, *shape[1:])
        planned.append(PlannedTensor(name, key, shape, _format(name, shape, kind)))
    return planned


def _format(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return a tensor's format: llama.cpp convolves in f32 or f16 alone, and adds positions in f32."""
    from gguf import GGMLQuantizationType

    if name.startswith("v.position_embd"):
        return GGMLQuantizationType.F32
    if len(shape) > 2 and kind != GGMLQuantizationType.F32:
        return GGMLQuantizationType.F16
    return format_for(shape, kind)


def _name(key: str) -> str:
    if key.startswith(_ADAPTER):
        part = key.removeprefix(_ADAPTER)
        return _ADAPTER_NAMES.get(part) or _with_suffix(_ADAPTER_NAMES, part)
    part = key.removeprefix(_TOWER)
    if part.startswith("encoder.layers."):
        _, _, number, part = part.split(".", 3)
        return f"v.blk.{number}.{_with_suffix(_LAYER, part)}"
    return _with_suffix(_EMBEDDINGS, part)


def _with_suffix(names: dict[str, str], part: str) -> str:
    module, _, suffix = part.rpartition(".")
    return f"{names[module]}.{suffix}"
