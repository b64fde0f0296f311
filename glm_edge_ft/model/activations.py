"""The memory that one training step takes besides weights and optimizer states, found by running it without memory.

The model's own forward and backward pass run on fake tensors (`torch._subclasses.fake_tensor`): every operator gives
tensors of the right shape and dtype without storage, and every storage that would be allocated is counted until it
would be freed. So the count follows what the layers really keep for the backward pass: fused attention, the copies of
autocast and LoRA, checkpointed layers, the chunked loss of supervised tokens. It takes seconds and reads no weights.

On a GPU dropout keeps a mask of one byte a number, which is followed here; fused attention keeps keys and values of
grouped heads once instead of repeated, which is not, so that without checkpointing the estimate is a little high.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.glm.modeling_glm import GlmRMSNorm

from glm_edge_ft.model.fast_layers import SharedDropout, skip_input_cast


@dataclass(frozen=True)
class BatchShape:
    """The batch of a step.

    Attributes:
        rows, length: number of rows, and tokens of the longest; others are padded to it, unless they are packed.
        supervised: supervised tokens of all rows.
        images: shape of the pixels, `(images, channels, side, side)`; None: there are none.
        packed: tokens of all rows where they are packed; None: they are padded.
    """

    rows: int
    length: int
    supervised: int
    images: tuple[int, int, int, int] | None = None
    packed: int | None = None


@dataclass(frozen=True)
class StepFormats:
    """Dtypes of a step.

    Attributes:
        frozen, trained: of the weights as the layers see them.
        autocast: in which autocast computes; None: without it.
        on_gpu: whether dropout keeps what it keeps on a GPU.
    """

    frozen: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None
    on_gpu: bool


@dataclass(frozen=True)
class StepTrace:
    """What one step allocates, weights, their gradients and optimizer states left out.

    Attributes:
        kept: bytes that the forward pass leaves for the backward pass.
        moments: `(trained, bytes)`, in order: the most bytes in use while the gradients of so many trained numbers are
            complete; a gradient counts in bytes only while it is computed.
    """

    kept: int
    moments: tuple[tuple[int, int], ...]

    def peak(self, gradient_bytes: float, held: float = 0.0) -> int:
        """Return the most bytes that activations and gradients take together.

        A complete gradient takes `gradient_bytes` a number; gradients of `held` bytes are there from the beginning.
        """
        return int(max(size + max(done * gradient_bytes, held) for done, size in self.moments))


class _Storages(TorchDispatchMode):
    """Counts the bytes of storages that operators make, until they are freed.

    A fake mask of supervised positions has no content: `nonzero` returns as many places as the batch supervises.
    """

    def __init__(self, supervised: int) -> None:
        super().__init__()
        self.supervised = supervised
        self.live = self.highest = 0
        self.known: set[int] = set()

    def take_highest(self) -> int:
        """Return the most bytes in use since this was last asked."""
        highest, self.highest = self.highest, self.live
        return highest

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            result = torch.empty(self.supervised, args[0].dim(), dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage: Any = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.highest = max(self.highest, self.live)
        return result


def trace_step(
    model: Any,
    batch: BatchShape,
    formats: StepFormats,
    install_loss: Callable[[Any], None],
    checkpointing: Mapping[str, Any] | None = None,
) -> StepTrace:
    """Run one forward and backward pass of `model` without memory and return what it would allocate.

    Args:
        model: on the meta device, with its adapter, `requires_grad` as in training. Afterwards its weights are fake.
        batch: the batch. Attention gets a mask only beside a trained prefix, as in `GlmEdgeTrainer`.
        formats: dtypes.
        install_loss: makes a model compute its loss as training does.
        checkpointing: `activation_checkpointing_kwargs` of the training arguments; None: it is off.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    install_loss(base)
    model.train()
    if checkpointing is not None:  # as the Trainer does
        settings = dict(checkpointing)
        layers = settings.pop("every_n_layers", 1)
        settings.pop("offload", None)
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings or None, every_n_layers=layers)
    if formats.autocast is not None:
        skip_input_cast(model)
    if formats.on_gpu:
        _compute_as_gpu(model)
    counter = _Storages(batch.supervised)
    moments: list[tuple[int, int]] = []
    done = 0

    def note_gradient(weight: torch.Tensor) -> None:
        nonlocal done
        moments.append((done, counter.take_highest()))
        done += weight.numel()
        weight.grad = None

    with FakeTensorMode(allow_non_fake_inputs=True):  # PEFT keeps the ids of a prefix aside
        _make_fake(model, formats)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(note_gradient)
        has_prefix = model is not base and model.active_peft_config.is_prompt_learning
        inputs = _make_batch(base, batch, needs_mask=has_prefix)
        for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
            counter.known.add(tensor.untyped_storage()._cdata)
        with counter:
            with torch.autocast("cpu", dtype=formats.autocast, enabled=formats.autocast is not None):
                loss = model(**inputs, num_items_in_batch=1).loss
            kept = counter.live
            loss.backward()
        moments.append((done, counter.take_highest()))
    return StepTrace(kept, tuple(moments))


def _compute_as_gpu(model: nn.Module) -> None:
    """Let dropout keep a mask of one byte a number, and RMS norms their input alone, as GPU kernels do."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            name = "drop" if isinstance(module, SharedDropout) else "forward"
            setattr(module, name, functools.partial(_fused_dropout, module.p))
        elif type(module) is GlmRMSNorm:
            module.forward = functools.partial(_compute_norm, module, module.forward)  # type: ignore[method-assign]


def _compute_norm(norm: GlmRMSNorm, original: Callable[[torch.Tensor], Any], hidden_states: torch.Tensor) -> Any:
    is_fused = hidden_states.dtype == norm.weight.dtype
    return _FusedNorm.apply(hidden_states, norm.weight) if is_fused else original(hidden_states)


class _FusedNorm(torch.autograd.Function):
    """Allocates and keeps what PyTorch's RMS norm on a GPU does; the numbers mean nothing."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden_states, weight, scale)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = ctx.saved_tensors[1]
        return torch.empty_like(gradients[0]), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _fused_dropout(rate: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.native_dropout(hidden_states, rate, True)[0]


def _make_fake(model: nn.Module, formats: StepFormats) -> None:
    """Replace weights and buffers on the meta device by fake tensors that act as if they were on the CPU."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            dtype = formats.trained if weight.requires_grad else formats.frozen
            fake = torch.empty(weight.shape, dtype=dtype, device="cpu")
            module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _make_batch(base: Any, batch: BatchShape, needs_mask: bool) -> dict[str, torch.Tensor]:
    shape = (batch.rows, batch.length) if batch.packed is None else (1, batch.packed)
    ids = torch.zeros(shape, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": torch.zeros_like(ids)}
    if needs_mask:
        inputs["attention_mask"] = torch.ones_like(ids)
    if hasattr(base.get_decoder(), "count_images"):  # fake ids hold no placeholders to count
        base.get_decoder().count_images = lambda *_, **__: []
        if batch.images is not None:
            inputs["pixel_values"] = torch.zeros(batch.images)
    return inputs
