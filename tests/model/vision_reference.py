"""GLM-Edge-V once more, from plain tensors and the description of the released layout alone, for one row at a time.

Nothing of transformers or of the package is used: attention, norms, rotary positions and the merge are written out, so
that the model's output can be held against an implementation that shares no line with it.
"""

from __future__ import annotations

import math

import torch

from tests.model.vision_fixtures import TOKENS_PER_IMAGE, Shape

Weights = dict[str, torch.Tensor]


def layer_norm(values: torch.Tensor, weights: Weights, name: str, eps: float) -> torch.Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift."""
    centred = values - values.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square, eps 1e-5."""
    return values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def affine(values: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Apply a linear layer with its bias, if it has one."""
    result = values @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return result if bias is None else result + bias


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Normalise the exponentials of the last dimension."""
    exponentials = (scores - scores.max(-1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def gelu_tanh(values: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, as SigLIP has it."""
    return 0.5 * values * (1 + (math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)).tanh())


def gelu_exact(values: torch.Tensor) -> torch.Tensor:
    """GELU by the error function, as GLM-4V's adapter has it."""
    return 0.5 * values * (1 + torch.erf(values / math.sqrt(2)))


def silu(values: torch.Tensor) -> torch.Tensor:
    """x times its logistic function."""
    return values / (1 + (-values).exp())


def tower(weights: Weights, pixels: torch.Tensor, shape: Shape) -> torch.Tensor:
    """`(3, 672, 672)` to `(2304, tower_hidden)`: patches row by row, all layers, post_layernorm."""
    name = "model.vision.vit.model.vision_model."
    patches = pixels.reshape(3, 48, 14, 48, 14).permute(1, 3, 0, 2, 4).reshape(2304, 3 * 14 * 14)
    kernel = weights[f"{name}embeddings.patch_embedding.weight"].reshape(shape.tower_hidden, -1)
    hidden = patches @ kernel.T + weights[f"{name}embeddings.patch_embedding.bias"]
    hidden = hidden + weights[f"{name}embeddings.position_embedding.weight"]
    size = shape.tower_hidden // shape.tower_heads
    for layer in range(shape.tower_layers):
        part = f"{name}encoder.layers.{layer}."
        normed = layer_norm(hidden, weights, f"{part}layer_norm1", 1e-6)
        query, key, value = (affine(normed, weights, f"{part}self_attn.{kind}_proj") for kind in ("q", "k", "v"))
        heads = []
        for head in range(shape.tower_heads):
            chosen = slice(head * size, (head + 1) * size)
            heads.append(softmax(query[:, chosen] @ key[:, chosen].T / math.sqrt(size)) @ value[:, chosen])
        hidden = hidden + affine(torch.cat(heads, dim=1), weights, f"{part}self_attn.out_proj")
        normed = layer_norm(hidden, weights, f"{part}layer_norm2", 1e-6)
        hidden = hidden + affine(gelu_tanh(affine(normed, weights, f"{part}mlp.fc1")), weights, f"{part}mlp.fc2")
    return layer_norm(hidden, weights, f"{name}post_layernorm", 1e-6)


def adapter(weights: Weights, patches: torch.Tensor, shape: Shape) -> torch.Tensor:
    """`(2304, tower_hidden)` to `(578, hidden)`."""
    name = "model.vision.adapter."
    squares = patches.reshape(24, 2, 24, 2, shape.tower_hidden).permute(0, 2, 4, 1, 3).reshape(576, -1)
    kernel = weights[f"{name}conv.weight"].reshape(shape.hidden, -1)
    tokens = squares @ kernel.T + weights[f"{name}conv.bias"]
    tokens = affine(tokens, weights, f"{name}linear_proj.linear_proj")
    tokens = gelu_exact(layer_norm(tokens, weights, f"{name}linear_proj.norm1", 1e-5))
    gate = silu(affine(tokens, weights, f"{name}linear_proj.gate_proj"))
    tokens = gate * affine(tokens, weights, f"{name}linear_proj.dense_h_to_4h")
    tokens = affine(tokens, weights, f"{name}linear_proj.dense_4h_to_h")
    boi, eoi = (weights[f"{name}{boundary}"].reshape(1, shape.hidden) for boundary in ("boi", "eoi"))
    return torch.cat([boi, tokens, eoi])


def merge(embeddings: torch.Tensor, input_ids: list[int], vectors: list[torch.Tensor], image_id: int) -> torch.Tensor:
    """Cut the row at each run of placeholders and put the next image's vectors in between; `(length, hidden)`."""
    pieces, position, waiting = [], 0, list(vectors)
    while position < len(input_ids):
        if input_ids[position] == image_id:
            assert input_ids[position : position + TOKENS_PER_IMAGE] == [image_id] * TOKENS_PER_IMAGE
            pieces.append(waiting.pop(0))
            position += TOKENS_PER_IMAGE
        else:
            pieces.append(embeddings[position : position + 1])
            position += 1
    assert not waiting
    return torch.cat(pieces)


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (2i, 2i + 1) of each position's `(length, head_dim)` by position / 10000^(2i / head_dim)."""
    length, size = values.shape
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    even, odd = values[:, 0::2], values[:, 1::2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1)
    return turned.flatten(1)


def language_model(weights: Weights, hidden: torch.Tensor, shape: Shape) -> torch.Tensor:
    """`(length, hidden)` embeddings to `(length, vocabulary)` logits."""
    future = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)
    for layer in range(shape.layers):
        name = f"model.layers.{layer}."
        normed = rms_norm(hidden, weights[f"{name}input_layernorm.weight"])
        query, key, value = (
            affine(normed, weights, f"{name}self_attn.{kind}_proj").split(shape.head_dim, dim=1)
            for kind in ("q", "k", "v")
        )
        heads = []
        for head in range(shape.heads):
            shared = head * shape.key_value_heads // shape.heads
            scores = rotate(query[head]) @ rotate(key[shared]).T / math.sqrt(shape.head_dim)
            heads.append(softmax(scores + future) @ value[shared])
        hidden = hidden + affine(torch.cat(heads, dim=1), weights, f"{name}self_attn.o_proj")
        normed = rms_norm(hidden, weights[f"{name}post_attention_layernorm.weight"])
        gate, up = affine(normed, weights, f"{name}mlp.gate_up_proj").split(shape.intermediate, dim=1)
        hidden = hidden + affine(silu(gate) * up, weights, f"{name}mlp.down_proj")
    return affine(rms_norm(hidden, weights["model.norm.weight"]), weights, "lm_head")


def reference_logits(weights: Weights, input_ids: list[int], images: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return the logits of one row, `(length, vocabulary)`; `images` is `(count, 3, 672, 672)`."""
    vectors = [adapter(weights, tower(weights, image, shape), shape) for image in images]
    embeddings = weights["model.embed_tokens.weight"][input_ids]
    return language_model(weights, merge(embeddings, input_ids, vectors, shape.image), shape)
