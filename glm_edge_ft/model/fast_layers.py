"""Parts of a training step that cost less time or memory than the libraries' own, on a model's own modules.

Each function here changes modules of the one model that it gets; nothing in transformers, PEFT or PyTorch is replaced.
What each is worth is in `tests/bench/RESULTS.md`.

- Dropout of LoRA: PEFT gives each adapted layer a dropout of its own. The projections for queries, keys and values read
  one input: three masks would be drawn for it, and three dropped copies kept for the backward pass. Here they share
  one, as in LoRA's first implementation (`MergedLinear` in loralib); each layer's distribution stays the same.
- RMS norm on a GPU: one operation instead of eight, which keeps a 16-bit input as it came instead of in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.models.glm.modeling_glm import GlmRMSNorm

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers in one module that read the same input."""
_STEPS = 1 << 16  # on a CPU a probability is rounded to the nearest multiple of 1 / 65,536


@dataclass
class _SharedInput:
    """What the dropouts of a group share during a forward pass; nothing of it is kept afterwards.

    Attributes:
        layers: how many layers the group has.
        source, dropped: the input that the first of them got, and its dropped copy.
        waiting: how many of them still have to ask for it.
    """

    layers: int
    source: torch.Tensor | None = None
    dropped: torch.Tensor | None = None
    waiting: int = 0


class SharedDropout(torch.nn.Dropout):
    """`torch.nn.Dropout` that is computed once for each input of a group of layers.

    The random bits come from PyTorch's generator, so that they can be seeded, and restored from a checkpoint. PyTorch
    draws 64 bits for each element on a CPU, one after another; a probability needs no more than 16. There a byte for
    each element is kept for the backward pass, not a float.
    """

    def __init__(self, p: float, shared: _SharedInput) -> None:
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
    """Replace the dropout of every LoRA layer in `model`, one for the layers of a module that read the same input.

    Layers whose rates differ share nothing; a dropout of another class stays as it is.
    """
    for module in model.modules():
        layers = {name: layer for name, layer in module.named_children() if isinstance(layer, LoraLayer)}
        for names in (*SAME_INPUT, *((name,) for name in layers if not any(name in group for group in SAME_INPUT))):
            places: dict[tuple[str, float], list[torch.nn.ModuleDict]] = {}
            for dropouts in (layers[name].lora_dropout for name in names if name in layers):
                for adapter, dropout in dropouts.items():
                    if type(dropout) is torch.nn.Dropout:
                        places.setdefault((adapter, dropout.p), []).append(dropouts)
            for (adapter, rate), found in places.items():
                shared = _SharedInput(layers=len(found))
                for dropouts in found:
                    dropouts[adapter] = SharedDropout(rate, shared)


def skip_input_cast(model: torch.nn.Module) -> None:
    """Let the LoRA layers of `model` take their inputs as they come; it must be run under autocast from now on.

    PEFT casts 16-bit inputs to the float32 of the matrices, and autocast casts their dropped copy back to 16 bits: the
    same numbers, by way of a copy of twice the size in each layer. A variant, such as DoRA, needs the cast.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False


def fuse_norms(model: PreTrainedModel) -> bool:
    """Let the RMS norms of GLM layers in `model` be one operation on a GPU; return whether there are any.

    PyTorch's kernel computes in float32 and rounds once at the end; transformers rounds before the weight, too.
    """
    norms = [norm for norm in model.modules() if type(norm) is GlmRMSNorm]
    for norm in norms:
        norm.forward = functools.partial(_compute_norm, norm, norm.forward)  # type: ignore[method-assign]
    return bool(norms)


def _compute_norm(norm: GlmRMSNorm, original: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling() or not hidden_states.is_cuda or hidden_states.dtype != norm.weight.dtype:
        output: torch.Tensor = original(hidden_states)
        return output
    with torch.autocast("cuda", enabled=False):  # it would turn all of it, the result included, into float32
        return torch.nn.functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)
