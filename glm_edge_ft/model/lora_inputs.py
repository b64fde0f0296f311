"""What LoRA does to the inputs of its layers: once for the layers that read the same one, with few random bits.

PEFT gives each adapted layer a dropout of its own. The projections for queries, keys and values read one input: three
masks are drawn for it, and three dropped copies of it are kept for the backward pass. Here they share one, as in LoRA's
first implementation (`MergedLinear` in loralib), which leaves each layer's distribution as it is.

On a CPU PyTorch draws the numbers of a mask one after another, 64 bits for each: a tenth of a training step goes into
it. A probability needs no more than 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# names of layers in one module that read the same input
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_STEPS = 1 << 16  # on a CPU a probability is rounded to the nearest multiple of 1 / 65,536


@dataclass
class _Shared:
    """What the layers of a group hand to one another during a forward pass; nothing is left of it afterwards.

    Attributes:
        layers: how many they are.
        source, dropped: the input that the first of them got, and what became of it.
        waiting: how many of them are still to ask for it.
    """

    layers: int
    source: torch.Tensor | None = None
    dropped: torch.Tensor | None = None
    waiting: int = 0


class LoraDropout(torch.nn.Dropout):
    """What `torch.nn.Dropout` does, once for each input of a group of layers.

    The random bits come from PyTorch's generator, so that they can be seeded, and restored from a checkpoint. On a CPU
    a byte for each element is kept for the backward pass, not a float.
    """

    def __init__(self, p: float, shared: _Shared) -> None:
        super().__init__(p)
        self.shared = shared

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the parent's name
        """Return `input`, of any shape, with elements set to 0 with probability `p` and the others scaled to match."""
        if not self.training:
            return input
        shared = self.shared
        if shared.source is not input or shared.dropped is None:
            shared.source, shared.dropped, shared.waiting = input, self.drop(input), shared.layers
        dropped = shared.dropped
        shared.waiting -= 1
        if shared.waiting <= 0:
            shared.source = shared.dropped = None
        return dropped

    def drop(self, input: torch.Tensor) -> torch.Tensor:
        """Return what `forward` returns in training, drawn anew."""
        zeros = round(self.p * _STEPS)
        if input.device.type != "cpu" or not 0 < zeros < _STEPS:
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        return input * (bits >= zeros - _STEPS // 2) * (_STEPS / (_STEPS - zeros))


def share_dropout(model: torch.nn.Module) -> None:
    """Replace the dropout of every LoRA layer in `model`, one for the layers of a module that read the same input."""
    for module in model.modules():
        for layers in groups_of_same_input(module):
            _share([layer.lora_dropout for layer in layers])


def groups_of_same_input(module: torch.nn.Module) -> list[list[Any]]:
    """Return the LoRA layers that `module` itself holds, those that read the same input together."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in module.named_children() if isinstance(layer, LoraLayer)}
    groups = [[name for name in names if name in layers] for names in SAME_INPUT]
    alone = set(layers).difference(*groups)
    return [[layers[name] for name in group] for group in (*groups, *([name] for name in sorted(alone))) if group]


def skip_input_cast(model: torch.nn.Module) -> None:
    """Let the LoRA layers of `model` take their inputs as they come; it must be run under autocast from now on.

    PEFT turns 16-bit inputs into the float32 of the matrices, and autocast turns what was dropped of them back into 16
    bits: the same numbers, by way of a copy of twice the size in each layer.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if (
            isinstance(layer, LoraLayer) and not layer.lora_variant
        ):  # a variant, such as DoRA, computes with them itself
            layer.cast_input_dtype_enabled = False


def _share(dropouts: list[torch.nn.ModuleDict]) -> None:
    """Let the dropouts of some layers, by the names of their adapters, share their results where the rates agree."""
    places: dict[tuple[str, float], list[torch.nn.ModuleDict]] = {}
    for dropout in dropouts:
        for adapter, module in dropout.items():
            if type(module) is torch.nn.Dropout:
                places.setdefault((adapter, module.p), []).append(dropout)
    for (adapter, rate), found in places.items():
        shared = _Shared(layers=len(found))
        for dropout in found:
            dropout[adapter] = LoraDropout(rate, shared)
