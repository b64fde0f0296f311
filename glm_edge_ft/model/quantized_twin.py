"""The meta twin of a model in 4 bits, by which its memory is estimated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glm_edge_ft.model.quantization import BLOCK, find_layers, find_stored_layers, is_stored_in_4_bits, stored_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = 256  # scales with a common scale
_TABLES = 4 * (16 + 256 + 1)  # of each layer: the values of half a byte, those of a scale's byte, the scales' mean


class QuantizedTwin(nn.Linear):
    """Stands for a layer in 4 bits where memory is estimated: its weight counts `stored_bytes`, wherever it lies.

    It allocates what such a layer does: plain numbers of the weight, in each pass anew.
    """

    stored_bytes: int

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `(..., out_features)` in the format of `hidden_states`; the numbers mean nothing."""
        product: Any = _Product.apply(hidden_states.to(self.weight.dtype), self.weight)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.to(hidden_states.dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that is made for it, in both directions, and not kept."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(hidden_states, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient.matmul(torch.empty_like(ctx.weight).to(gradient.dtype)), None


def quantize_twin(twin: PreTrainedModel, quantization: str | None) -> None:
    """Give a model's meta twin the layers in 4 bits that the model will have, by `quantization` or as it is stored."""
    settings = stored_settings(twin.config)
    if is_stored_in_4_bits(twin.config):
        assert settings is not None
        layers, double = find_stored_layers(twin, settings), bool(settings.get("bnb_4bit_use_double_quant"))
    elif quantization is None:
        return
    else:
        layers, double = find_layers(twin), True
    for name in layers:
        plain: Any = twin.get_submodule(name)
        plain.__class__ = QuantizedTwin
        plain.weight.requires_grad_(False)
        plain.stored_bytes = count_bytes(plain.weight.numel(), double)


def count_bytes(numbers: int, double: bool = True) -> int:
    """Return the bytes of a weight in 4 bits with its scales, these in a byte each with `double`, else in four."""
    blocks = math.ceil(numbers / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / SCALES) + _TABLES if double else 4 * blocks + 4 * 16
    return math.ceil(numbers / 2) + scales
