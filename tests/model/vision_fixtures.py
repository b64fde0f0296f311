"""GLM-Edge-V checkpoints in the released layout at small widths: plain safetensors and JSON, no model class involved.

The geometry is the true one: 672 pixels, patches of 14, 2304 positions, 578 vectors. Key names, ranks of tensors and
config fields are those of the released files (the config is of transformers 4.47's time).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKENS_PER_IMAGE = 578
IMAGE_SIDE = 672
AUTO_MAP = {"AutoModelForCausalLM": "modeling_glm.GlmForCausalLM"}


@dataclass(frozen=True)
class Shape:
    """The widths of a checkpoint; special ids take the last 18 places of the vocabulary, as in the released models."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int = 59264
    tower_hidden: int = 24
    tower_intermediate: int = 90
    tower_layers: int = 2
    tower_heads: int = 2

    @property
    def end_of_text(self) -> int:
        """`<|endoftext|>`, which also pads: 59246."""
        return self.vocabulary - 18

    @property
    def user(self) -> int:
        """`<|user|>`: 59253."""
        return self.vocabulary - 11

    @property
    def assistant(self) -> int:
        """`<|assistant|>`: 59254."""
        return self.vocabulary - 10

    @property
    def image(self) -> int:
        """`<|begin_of_image|>`: 59256."""
        return self.vocabulary - 8


TINY_2B = Shape(hidden=32, intermediate=96, layers=2, heads=4, key_value_heads=1, head_dim=8)
TINY_5B = Shape(hidden=48, intermediate=128, layers=3, heads=4, key_value_heads=1, head_dim=12)
SMALL_VOCABULARY = Shape(hidden=32, intermediate=96, layers=2, heads=4, key_value_heads=1, head_dim=8, vocabulary=300)
TRUE_2B = Shape(2048, 6144, 28, 16, 4, 128, 59264, 1152, 4304, 27, 16)
TRUE_5B = Shape(3072, 8192, 40, 24, 6, 128, 59264, 1152, 4304, 27, 16)


def released_config(shape: Shape) -> dict[str, Any]:
    """Return the fields of `config.json` as the released vision checkpoints have them."""
    return {
        "architectures": ["GlmForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": AUTO_MAP,
        "boi_token_id": shape.image,
        "eoi_token_id": shape.image + 1,
        "eos_token_id": [shape.end_of_text, shape.user, shape.user + 2],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 8192,
        "model_type": "glm",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "pad_token_id": shape.end_of_text,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,  # as in the one copy seen, although the files hold a separate lm_head.weight
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0.dev0",
        "use_cache": True,
        "vision_config": {
            "hidden_size": shape.tower_hidden,
            "image_size": IMAGE_SIDE,
            "intermediate_size": shape.tower_intermediate,
            "num_attention_heads": shape.tower_heads,
            "num_channels": 3,
            "num_hidden_layers": shape.tower_layers,
            "patch_size": 14,
        },
        "vocab_size": shape.vocabulary,
    }


def released_shapes(shape: Shape, boundary: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    """Return every key of a released checkpoint, pooling head included, with the shape of its tensor."""
    hidden, width, tower = shape.hidden, shape.intermediate, shape.tower_hidden
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocabulary, hidden),
    }
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = (hidden,)
        shapes[name + "post_attention_layernorm.weight"] = (hidden,)
        shapes[name + "self_attn.q_proj.weight"] = (shape.heads * shape.head_dim, hidden)
        shapes[name + "self_attn.k_proj.weight"] = (shape.key_value_heads * shape.head_dim, hidden)
        shapes[name + "self_attn.v_proj.weight"] = (shape.key_value_heads * shape.head_dim, hidden)
        shapes[name + "self_attn.o_proj.weight"] = (hidden, shape.heads * shape.head_dim)
        shapes[name + "mlp.gate_up_proj.weight"] = (2 * width, hidden)
        shapes[name + "mlp.down_proj.weight"] = (hidden, width)
    vit = "model.vision.vit.model.vision_model."
    shapes[vit + "embeddings.patch_embedding.weight"] = (tower, 3, 14, 14)
    shapes[vit + "embeddings.patch_embedding.bias"] = (tower,)
    shapes[vit + "embeddings.position_embedding.weight"] = (2304, tower)
    affine: dict[str, tuple[int, ...]] = {"layer_norm1": (tower,), "layer_norm2": (tower,)}
    affine |= {f"self_attn.{part}_proj": (tower, tower) for part in ("q", "k", "v", "out")}
    affine |= {"mlp.fc1": (shape.tower_intermediate, tower), "mlp.fc2": (tower, shape.tower_intermediate)}
    for layer in range(shape.tower_layers):
        for part, size in affine.items():
            shapes[f"{vit}encoder.layers.{layer}.{part}.weight"] = size
            shapes[f"{vit}encoder.layers.{layer}.{part}.bias"] = size[:1]
    shapes |= {f"{vit}post_layernorm.{part}": (tower,) for part in ("weight", "bias")}
    shapes |= _head_shapes(vit + "head.", shape)
    adapter = "model.vision.adapter."
    shapes[adapter + "boi"] = shapes[adapter + "eoi"] = (1, 1, hidden) if boundary is None else boundary
    shapes[adapter + "conv.weight"] = (hidden, tower, 2, 2)
    shapes[adapter + "conv.bias"] = (hidden,)
    shapes[adapter + "linear_proj.linear_proj.weight"] = (hidden, hidden)
    shapes[adapter + "linear_proj.norm1.weight"] = shapes[adapter + "linear_proj.norm1.bias"] = (hidden,)
    shapes[adapter + "linear_proj.gate_proj.weight"] = (width, hidden)
    shapes[adapter + "linear_proj.dense_h_to_4h.weight"] = (width, hidden)
    shapes[adapter + "linear_proj.dense_4h_to_h.weight"] = (hidden, width)
    return shapes


def _head_shapes(name: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    tower, width = shape.tower_hidden, shape.tower_intermediate
    return {
        name + "probe": (1, 1, tower),
        name + "attention.in_proj_weight": (3 * tower, tower),
        name + "attention.in_proj_bias": (3 * tower,),
        name + "attention.out_proj.weight": (tower, tower),
        name + "attention.out_proj.bias": (tower,),
        name + "layernorm.weight": (tower,),
        name + "layernorm.bias": (tower,),
        name + "mlp.fc1.weight": (width, tower),
        name + "mlp.fc1.bias": (width,),
        name + "mlp.fc2.weight": (tower, width),
        name + "mlp.fc2.bias": (tower,),
    }


def random_weights(shape: Shape, boundary: tuple[int, ...] | None = None) -> dict[str, torch.Tensor]:
    """Return a float32 tensor for each key, large enough that every prediction depends on words and image.

    Norm weights lie around 1, biases are not 0, so that a forgotten one shows.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, size in sorted(released_shapes(shape, boundary).items()):
        values = torch.randn(size, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1.0 + 0.2 * values
        elif name.endswith("bias"):
            values = 0.2 * values
        elif "position_embedding" in name:
            values = 0.5 * values
        elif name == "lm_head.weight":
            values = 0.05 * values
        elif "embed_tokens" not in name and not name.endswith(("boi", "eoi")):
            values = values / values[0].numel() ** 0.5
        weights[name] = values
    return weights


def write_checkpoint(
    folder: Path,
    shape: Shape,
    weights: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """Write a checkpoint folder, in one weight file or in several with an index; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(shape) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config or released_config(shape), indent=2), encoding="utf-8")
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    """Return `(count, 3, 672, 672)` pixels between -1 and 1: smooth, with a different scene for each image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 12, 12, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear")


def image_row(shape: Shape, *words: int, after: tuple[int, ...] = (40, 41)) -> list[int]:
    """Return the ids of one user turn that starts with an image, then `words`, then the assistant's `after`."""
    return [shape.user, *[shape.image] * TOKENS_PER_IMAGE, *words, shape.assistant, *after]


def pad_left(shape: Shape, *rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, both `(batch, length)`, with padding on the left."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[shape.end_of_text] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
