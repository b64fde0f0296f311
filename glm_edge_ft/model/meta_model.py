"""4-bit layers of a model on the meta device, by which adapters are checked and memory is estimated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glm_edge_ft.model.quantization import (
    BLOCK,
    find_4bit_layers,
    find_quantizable_layers,
    is_4bit_checkpoint,
    quantization_settings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = 256  # scales with a common scale
_TABLES = 4 * (16 + 256 + 1)  # bytes of each layer: values of half a byte, values of a scale's byte, mean of the scales


class MetaLinear4bit(nn.Linear):
    """A linear layer that counts as 4 bits: `stored_bytes` for its weight, and in each pass the unquantized weight."""

    stored_bytes: int

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `(..., out_features)` in the dtype of `hidden_states`; the numbers mean nothing."""
        product: Any = _Product.apply(hidden_states.to(self.weight.dtype), self.weight)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.to(hidden_states.dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that is dequantized for it, in both directions, and not kept."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(hidden_states, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient.matmul(torch.empty_like(ctx.weight).to(gradient.dtype)), None


def quantize_meta_model(model: PreTrainedModel, quantization: str | None) -> None:
    """Give a model on the meta device its 4-bit layers: those that `quantization` makes, or that its files store."""
    settings = quantization_settings(model.config)
    if is_4bit_checkpoint(model.config):
        assert settings is not None
        layers, double = find_4bit_layers(model, settings), bool(settings.get("bnb_4bit_use_double_quant"))
    elif quantization is None:
        return
    else:
        layers, double = find_quantizable_layers(model), True
    for name in layers:
        layer: Any = model.get_submodule(name)
        layer.__class__ = MetaLinear4bit
        layer.weight.requires_grad_(False)
        layer.stored_bytes = count_bytes(layer.weight.numel(), double)


def count_bytes(numbers: int, double: bool = True) -> int:
    """Return the bytes of a 4-bit weight with its scales, each of a byte with `double` quantization, else of four."""
    blocks = math.ceil(numbers / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / SCALES) + _TABLES if double else 4 * blocks + 4 * 16
    return math.ceil(numbers / 2) + scales
