"""The vision part of GLM-Edge-V: transformers' SigLIP tower and the adapter, under the released key names.

The tower makes 48 x 48 patches of an image `(3, 672, 672)`, the adapter 24 x 24 tokens of these, with boi before them
and eoi after them. Sources: THUDM/GLM-Edge (modelling code), GLM-4V (the adapter), llama.cpp (vision graph).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionModel

from glm_edge_ft.model.glm_edge_v_config import CONVOLUTION_STRIDE, GlmEdgeVConfig, siglip_config

# No released file states these two. GLM-4V, whose adapter this is, has "none" (exact GELU) and PyTorch's default of
# 1e-5; llama.cpp computes with "tanh" and 1e-6. The difference is below bfloat16's resolution.
ADAPTER_GELU = "none"
ADAPTER_NORM_EPS = 1e-5


class _Tower(nn.Module):
    """The level `vit.model`, which holds transformers' tower under its released name."""

    def __init__(self, config: GlmEdgeVConfig) -> None:
        super().__init__()
        tower_config: Any = siglip_config(config)
        tower_config._attn_implementation = config._attn_implementation
        self.vision_model = SiglipVisionModel(tower_config)


class _VisionTransformer(nn.Module):
    """The level `vit`."""

    def __init__(self, config: GlmEdgeVConfig) -> None:
        super().__init__()
        self.model = _Tower(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, channels, side, side)` to `(images, patches, tower_hidden)`, after the last norm."""
        return self.model.vision_model(pixel_values=pixel_values).last_hidden_state


class GatedProjection(nn.Module):
    """The adapter's `linear_proj`: a projection with norm and GELU, then a gated feed-forward layer; no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm1 = nn.LayerNorm(hidden_size, eps=ADAPTER_NORM_EPS)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.dense_h_to_4h = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(images, tokens, hidden)` to the same shape."""
        hidden_states = self.norm1(self.linear_proj(hidden_states))
        hidden_states = nn.functional.gelu(hidden_states, approximate=ADAPTER_GELU)
        gate = nn.functional.silu(self.gate_proj(hidden_states))
        return self.dense_4h_to_h(gate * self.dense_h_to_4h(hidden_states))


class GlmEdgeVAdapter(nn.Module):
    """From the tower's patches to vectors of the language model, framed by boi and eoi."""

    def __init__(self, config: GlmEdgeVConfig) -> None:
        super().__init__()
        shape = config.boundary_shape or (1, 1, config.hidden_size)
        self.boi = nn.Parameter(torch.zeros(shape))
        self.eoi = nn.Parameter(torch.zeros(shape))
        self.conv = nn.Conv2d(
            siglip_config(config).hidden_size,
            config.hidden_size,
            kernel_size=CONVOLUTION_STRIDE,
            stride=CONVOLUTION_STRIDE,
        )
        self.linear_proj = GatedProjection(config.hidden_size, config.intermediate_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(images, patches, tower_hidden)`, row-major, to `(images, patches / 4 + 2, hidden)`."""
        images, count, width = patches.shape
        side = round(count**0.5)
        grid = patches.transpose(1, 2).reshape(images, width, side, side)
        tokens = self.linear_proj(self.conv(grid).flatten(2).transpose(1, 2))
        boi, eoi = (
            boundary.reshape(1, 1, -1).expand(images, 1, -1).to(tokens.dtype) for boundary in (self.boi, self.eoi)
        )
        return torch.cat([boi, tokens, eoi], dim=1)


class GlmEdgeVVision(nn.Module):
    """Tower and adapter. A frozen part keeps no graph, unless a trained part comes before it."""

    def __init__(self, config: GlmEdgeVConfig) -> None:
        super().__init__()
        self.vit = _VisionTransformer(config)
        self.adapter = GlmEdgeVAdapter(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, channels, side, side)` to `(images, tokens_per_image, hidden)`."""
        # Hooks that make embeddings require gradients, for gradient checkpointing, would start a graph in the tower.
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vit)):
            patches = self.vit(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (patches.requires_grad or _is_trained(self.adapter))):
            return self.adapter(patches)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
