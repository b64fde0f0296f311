"""The steps of a GLM layer between its matrix products, with fewer passes over memory and the same numbers.

transformers writes the rotary embedding as slices, a stack, two products, a sum and a concatenation, and autograd adds
as many backwards; the gradients of gate and up-projection, computed apart, are copied into one tensor at last. Here the
pairs of the rotary embedding are complex numbers that are turned in place, and the two gradients are written where they
belong. Products and sums are those of transformers, so results are the same bit for bit: on a CPU with AVX always where
a head's rotated half is a multiple of 8, elsewhere but for the last bit of a number here and there.

Norms give the same bits, too; their gradients, for which autograd goes back through every step of the formula, are the
same but for the order of summation. In 16 bit the states are kept for them as they came, not as float32. On a GPU a
norm is one operation of PyTorch's, which rounds once where transformers rounds twice.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from transformers.models.glm import modeling_glm

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

_apply_rotary_pos_emb = modeling_glm.apply_rotary_pos_emb


def use_fewer_copies(model: PreTrainedModel) -> None:
    """Let the GLM layers of `model` compute as described above, in training and generation; others stay as they are.

    The rotary embedding is a function of transformers' module, so it is replaced for all GLM models of this process.
    """
    modeling_glm.apply_rotary_pos_emb = rotate_queries_and_keys
    module: Any
    for module in model.modules():
        kind = type(module)
        if kind is modeling_glm.GlmMLP and module.config.hidden_act == "silu":
            module.forward = functools.partial(_compute_mlp, module)
        elif kind is modeling_glm.GlmRMSNorm:
            module.forward = functools.partial(_compute_norm, module, module.forward)


def rotate_queries_and_keys(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `apply_rotary_pos_emb` of transformers' GLM does; the names are those of its parameters.

    Only float32 on a CPU is computed here: there are no complex numbers of 16 bit, and a compiler fuses the original.
    Heads of an odd size are no pairs.

    Args:
        q, k: queries and keys, `(rows, heads, tokens, head_dim)`.
        cos, sin: of the angles, `(rows or 1, tokens, rotary_dim)`, the second half as the first.
        unsqueeze_dim: where q and k have the dimension of heads.
    """
    is_float32 = {q.dtype, k.dtype, cos.dtype, sin.dtype} == {torch.float32}
    if not is_float32 or q.device.type != "cpu" or q.shape[-1] % 2 or torch.compiler.is_compiling():
        return _apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    half = cos.shape[-1] // 2
    turn = torch.complex(cos[..., :half].contiguous(), sin[..., :half].contiguous()).unsqueeze(unsqueeze_dim)
    return _Rotation.apply(q, turn), _Rotation.apply(k, turn)


class _Rotation(torch.autograd.Function):
    """Turns neighbouring numbers, taken as one complex number, by an angle; its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """Return the states of heads, `(rows, heads, tokens, head_dim)`, turned."""
        ctx.save_for_backward(turn)
        return _rotate(states, turn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the states."""
        (turn,) = ctx.saved_tensors
        return _rotate(gradient, turn.conj().resolve_conj()), None


def _rotate(states: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    size = 2 * turn.shape[-1]
    if states.stride(-1) != 1 or any(places % 2 for places in (states.storage_offset(), *states.stride()[:-1])):
        states = states.clone(memory_format=torch.contiguous_format)
    rotated = torch.empty_like(states)
    rotated[..., size:] = states[..., size:]
    torch.mul(_as_pairs(states, size), turn, out=_as_pairs(rotated, size))
    return rotated


def _as_pairs(states: torch.Tensor, size: int) -> torch.Tensor:
    return torch.view_as_complex(states[..., :size].unflatten(-1, (-1, 2)))


def _compute_mlp(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return what `GlmMLP.forward` does."""
    gate_and_up = module.gate_up_proj(hidden_states)
    if torch.compiler.is_compiling():
        gate, up = gate_and_up.chunk(2, dim=-1)
        return module.down_proj(up * torch.nn.functional.silu(gate))
    return module.down_proj(_GatedUp.apply(gate_and_up))


class _GatedUp(torch.autograd.Function):
    """SwiGLU (Shazeer, 2020): silu(gate) x up, from both in one tensor `(..., 2 x intermediate_size)`."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Return `(..., intermediate_size)`."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return up * activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of both in one tensor."""
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result


def _compute_norm(
    module: Any, original: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
) -> torch.Tensor:
    """Return what `GlmRMSNorm.forward` does."""
    if torch.compiler.is_compiling():
        return original(hidden_states)
    if hidden_states.is_cuda and hidden_states.dtype == module.weight.dtype:
        return norm_in_one_operation(hidden_states, module.weight, module.variance_epsilon)
    if not torch.is_grad_enabled():
        return original(hidden_states)
    normed: torch.Tensor = _RmsNorm.apply(hidden_states, module.weight, module.variance_epsilon)
    return normed


def norm_in_one_operation(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return states, `(..., size)`, over their root mean square, times a weight, `(size,)` of the same format.

    PyTorch has a kernel for it on GPUs, where the formula is eight, each of which reads and writes the whole tensor.
    It computes in float32 and rounds at the end; transformers rounds before the weight, too. Autocast would turn all of
    it, the result included, into float32.
    """
    with torch.autocast(states.device.type, enabled=False):
        return torch.nn.functional.rms_norm(states, (states.shape[-1],), weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    """Root mean square normalization (Zhang and Sennrich, 2019) of the last dimension, times a weight."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return the states, `(..., size)`, over their root mean square, times the weight, `(size,)`."""
        exact = states.to(torch.float32)
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, weight, scale)
        normed = (exact * scale).to(states.dtype)
        return normed.mul_(weight) if weight.dtype == states.dtype else weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Return the gradients of the states and, where it is trained, of the weight; both are computed in float32."""
        states, weight, scale = ctx.saved_tensors
        exact, gradient = states.to(torch.float32), gradient.to(torch.float32)
        of_states = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (exact * scale).mul_(gradient).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            of_states = gradient * weight
            along = torch.linalg.vecdot(of_states, exact).unsqueeze(-1)
            along *= scale.pow(3) / -states.shape[-1]
            of_states = of_states.mul_(scale).addcmul_(exact, along).to(states.dtype)
        return of_states, of_weight, None
