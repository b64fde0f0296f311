"""LoRA layers that read the same input, computed together.

PEFT computes the projections for queries, keys and values one after another, each as a product, two narrow products, a
scaling and a sum, and autograd then adds up the gradients that their input gets from six sides. Here the layers are one
step of autograd: the narrow products that read the input are one, the update is added by the product that makes it, and
so are the gradients of the input. The numbers are those of PEFT up to the order of summation; hooks, names and saved
weights stay as they are.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from glm_edge_ft.model.lora_inputs import LoraDropout, groups_of_same_input

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Layers = list[Any]  # of peft.tuners.lora.Linear


def compute_lora_jointly(model: torch.nn.Module) -> None:
    """Let the LoRA layers of `model` compute as described above, in training, wherever `_adapter_of` finds them plain.

    All else goes PEFT's way: evaluation and generation, a quantized or trained base layer, variants such as DoRA,
    weights that ZeRO-3 shards, a compiled model.
    """
    for module in model.modules():
        for layers in groups_of_same_input(module):
            group = _Group(layers)
            for layer in layers:
                layer.forward = functools.partial(group.compute, layer, layer.forward)


class _Group:
    """LoRA layers that read the same input; the first that is called computes for all of them.

    Attributes:
        layers: the layers.
        source: the input of the call whose outputs wait.
        waiting: outputs that are still to be asked for.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.source: torch.Tensor | None = None
        self.waiting: dict[Any, torch.Tensor] = {}

    def compute(
        self, layer: Any, original: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the output of `layer` for `x`, `(..., in_features)`."""
        if args or kwargs or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return original(x, *args, **kwargs)
        if self.source is not x or layer not in self.waiting:
            outputs = _compute(self.layers, x)
            if outputs is None:
                return original(x)
            self.source, self.waiting = x, dict(zip(self.layers, outputs, strict=True))
        output = self.waiting.pop(layer)
        if not self.waiting:
            self.source = None
        return output


def _compute(layers: Layers, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Return the outputs of all layers; None where they are not to be computed together."""
    adapters = [_adapter_of(layer) for layer in layers]
    dropouts = {id(_source_of(layer, adapter)) for layer, adapter in zip(layers, adapters, strict=True) if adapter}
    if None in adapters or len(dropouts) != 1:
        return None
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weights, scalings = [], []
    for layer, adapter in zip(layers, adapters, strict=True):
        base = layer.get_base_layer()
        weights += [base.weight, base.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
        scalings.append(layer.scaling[adapter])
    formats = {(weight.device, weight.dtype) for weight in weights if weight is not None}
    if {place for place, _ in formats} != {x.device}:
        return None
    if not torch.is_autocast_enabled(device) and {kind for _, kind in formats} != {dtype}:
        return None
    dropout = layers[0].lora_dropout[adapters[0]]
    dropped = dropout.drop(x) if isinstance(dropout, LoraDropout) else None
    with torch.autocast(device, enabled=False):
        outputs: tuple[torch.Tensor, ...] = _JointLora.apply(
            x.to(dtype),
            None if dropped is None else dropped.to(dtype),
            scalings,
            *(None if weight is None else weight.to(dtype) for weight in weights),
        )
    return outputs


def _adapter_of(layer: Any) -> str | None:
    """Return the adapter of a layer that computes W x + b + s B A x and trains A and B alone, else None."""
    from peft.tuners import lora

    base, names = layer.get_base_layer(), layer.active_adapters
    if type(layer) is not lora.Linear or type(base) is not torch.nn.Linear or len(names) != 1:
        return None
    (name,) = names
    if layer.merged or layer.disable_adapters or layer.fan_in_fan_out or not layer.training:
        return None
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    narrow, wide, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(narrow) is not torch.nn.Linear or type(wide) is not torch.nn.Linear:
        return None
    if type(dropout) not in (LoraDropout, torch.nn.Identity) or any(map(_is_watched, (base, narrow, wide, dropout))):
        return None
    is_usual = not any(weight.requires_grad for weight in base.parameters()) and all(
        weight.requires_grad for weight in (narrow.weight, wide.weight)
    )
    return name if is_usual else None


def _is_watched(module: torch.nn.Module) -> bool:
    """Return whether something waits for calls of `module`; ZeRO-3 does, to fetch the weights that it shards."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or any(hasattr(weight, "ds_id") for weight in module.parameters(recurse=False))


def _source_of(layer: Any, adapter: str) -> Any:
    """Return what layers have in common that share what was dropped; None for those that drop nothing."""
    return getattr(layer.lora_dropout[adapter], "shared", None)


class _JointLora(torch.autograd.Function):
    """W x + b + s B A d for some layers, whose x and d are the same, and whose W and b are not trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        scalings: Sequence[float],
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Return an output, `(..., out_features)`, of each layer.

        Args:
            ctx: autograd's.
            x: `(..., in_features)`.
            dropped: d, as large; None: it is x.
            scalings: s of each layer.
            weights: W, b, A and B of the first layer, of the second, and so on; b may be None.
        """
        bases, biases, narrow, wide = (weights[kind::4] for kind in range(4))
        read = (x if dropped is None else dropped).flatten(0, -2)
        ranks = [len(matrix) for matrix in narrow if matrix is not None]
        inner = read @ _stacked(narrow).t()
        outputs = []
        for base, bias, matrix, scaling, part in zip(bases, biases, wide, scalings, inner.split(ranks, 1), strict=True):
            assert base is not None
            assert matrix is not None
            output = torch.nn.functional.linear(x, base, bias)
            output.view(-1, output.shape[-1]).addmm_(part, matrix.t(), alpha=scaling)
            outputs.append(output)
        ctx.save_for_backward(read, inner, *bases, *narrow, *wide)
        ctx.scalings, ctx.ranks, ctx.shape, ctx.drops = scalings, ranks, x.shape, dropped is not None
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, d, and every A and B."""
        read, inner, *weights = ctx.saved_tensors
        count = len(ctx.ranks)
        bases, narrow, wide = weights[:count], weights[count : 2 * count], weights[2 * count :]
        of_inner, of_x = torch.empty_like(inner), None
        of_wide = []
        parts = zip(inner.split(ctx.ranks, 1), of_inner.split(ctx.ranks, 1), strict=True)
        for gradient, base, matrix, scaling, (part, of_part) in zip(
            gradients, bases, wide, ctx.scalings, parts, strict=True
        ):
            flat = gradient.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                of_x = flat @ base if of_x is None else of_x.addmm_(flat, base)
            torch.mul(flat @ matrix, scaling, out=of_part)
            of_wide.append((flat.t() @ part).mul_(scaling))
        of_dropped = None
        if ctx.drops and ctx.needs_input_grad[1]:
            of_dropped = (of_inner @ _stacked(narrow)).view(ctx.shape)
        elif of_x is not None and not ctx.drops:
            of_x.addmm_(of_inner, _stacked(narrow))
        of_narrow = (of_inner.t() @ read).split(ctx.ranks)
        of_weights = (of for pair in zip(of_narrow, of_wide, strict=True) for of in (None, None, *pair))
        return None if of_x is None else of_x.view(ctx.shape), of_dropped, None, *of_weights


def _stacked(matrices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return the matrices one below the other; one alone as it is."""
    found = [matrix for matrix in matrices if matrix is not None]
    return found[0] if len(found) == 1 else torch.cat(found)
