"""Cross entropy on supervised tokens only.

A chat row has few supervised tokens, and GLM-Edge has a vocabulary of 59,264: logits for every position would be by
far the largest tensor of a step. Here the hidden states are selected before `lm_head`, and in a GLM decoder already
before the last layer's feed-forward block, whose output nothing else reads. The loss is summed over chunks of them. A
chunk's gradient is computed right after its loss where `lm_head` is frozen, as with LoRA, and, for more than one chunk,
where it is trained as a whole: its logits are then computed once and never kept.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm.modeling_glm import GlmDecoderLayer

from glm_edge_ft import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = 512  # 512 x 59,264 logits are 121 MB in float32
SOFTMAX_TOKENS = 64  # of them, whose probabilities are held at once; few fit a CPU's cache
GPU_SOFTMAX_TOKENS = 256  # a GPU computes a row in one of its hundred-odd processors, and each kernel launch costs


def install_supervised_loss(
    model: PreTrainedModel, gradients_in_forward: bool = True, label_smoothing: float = 0.0
) -> None:
    """Make `model` compute `supervised_cross_entropy` when called with labels; its outputs then hold no logits.

    `model` is the causal language model itself, not its PEFT, DDP or DeepSpeed wrapper: those call its `forward`, so
    the loss is computed inside their hooks. Calls without labels, `generate` among them, are unchanged. Labels are
    smoothed in training alone. `gradients_in_forward=False` computes the loss as under ZeRO-3 everywhere.
    """
    original = type(model).forward
    selects_positions = select_supervised_positions(model.get_decoder())

    @functools.wraps(original)  # the Trainer and `generate` read the signature
    def forward(self: PreTrainedModel, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Compute the loss where there are labels; else do as before."""
        if labels is None:
            return original(self, *args, **kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("logits_to_keep", None)
        kwargs["use_cache"] = False
        head, smoothing = self.get_output_embeddings(), label_smoothing if self.training else 0.0
        positions, targets = find_supervised(labels)
        if selects_positions and not torch.compiler.is_compiling():  # a graph is compiled for whole rows
            states = self.get_decoder()(*args, selected_positions=positions, **kwargs).last_hidden_state[0]
        else:
            states = self.get_decoder()(*args, **kwargs).last_hidden_state.flatten(0, 1).index_select(0, positions)
        return CausalLMOutputWithPast(
            loss=supervised_cross_entropy(states, targets, head, num_items_in_batch, gradients_in_forward, smoothing)
        )

    model.forward = types.MethodType(forward, model)


class LastGlmDecoderLayer(GlmDecoderLayer):
    """A GLM layer whose feed-forward block can skip tokens; it can be checkpointed like its parent."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, selected_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the output at the selected positions, `(1, selected, hidden)`; without them at all positions.

        Args:
            hidden_states: `(batch, length, hidden)`.
            args, kwargs: as the parent takes them.
            selected_positions: indices into the `batch x length` tokens, `(selected,)` int64.
        """
        if selected_positions is None:
            return super().forward(hidden_states, *args, **kwargs)
        update, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        selected = (hidden_states + update).flatten(0, 1).index_select(0, selected_positions).unsqueeze(0)
        output: torch.Tensor = selected + self.mlp(self.post_attention_layernorm(selected))
        return output


def select_supervised_positions(decoder: Any) -> bool:
    """Let a GLM decoder take `selected_positions`; return False, with nothing changed, for other decoders.

    A decoder passes its keyword arguments to all layers, and these to attention functions, which ignore unknown ones.
    """
    layers = getattr(decoder, "layers", None)
    if not layers or any(type(layer) not in (GlmDecoderLayer, LastGlmDecoderLayer) for layer in layers):
        return False
    layers[decoder.config.num_hidden_layers - 1].__class__ = LastGlmDecoderLayer
    return True


def find_supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of the `batch x length` tokens predict a supervised one, and its id, both `(supervised,)` int64."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, targets.index_select(0, positions)


def supervised_cross_entropy(
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    lm_head: torch.nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    gradients_in_forward: bool = True,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the cross entropy of supervised tokens, a float32 scalar.

    Equal to `transformers.loss.loss_utils.ForCausalLMLoss` on full logits, up to the order of summation.

    Args:
        hidden_states: `(supervised, hidden)`, the decoder's last hidden states at the positions that predict.
        targets: `(supervised,)`, the token ids to predict; without any the loss is 0.0, attached to the graph.
        lm_head: called as a module, so that adapters on it and sharded weights take part.
        num_items_in_batch: the number of supervised tokens of the whole optimizer step, by which the sum is divided, so
            that gradient accumulation is exact. None: the number in this batch.
        gradients_in_forward: whether gradients may be computed in the forward pass, right after the loss.
        label_smoothing: share of each target that is spread over the whole vocabulary.
    """
    count = targets.numel()
    divisor = (count if num_items_in_batch is None else num_items_in_batch) if count else 1
    if gradients_in_forward and _allows_gradients_in_forward(hidden_states, lm_head):
        is_frozen = not any(parameter.requires_grad for parameter in lm_head.parameters())
        weight = None if is_frozen else _plain_weight(lm_head)
        if is_frozen or (weight is not None and count > CHUNK_TOKENS):
            return _LossWithGradient.apply(hidden_states, targets, lm_head, divisor, weight, label_smoothing)
    chunks = _count_chunks(count, lm_head, hidden_states.device)
    total = hidden_states.new_zeros((), dtype=torch.float32)
    for chunk in zip(hidden_states.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
        if chunks > 1 and torch.is_grad_enabled():  # logits are computed again in the backward pass, not kept
            total = total + checkpoint(_summed_loss, *chunk, lm_head, label_smoothing, use_reentrant=False)
        else:
            total = total + _summed_loss(*chunk, lm_head, label_smoothing)
    return total / divisor


def _count_chunks(count: int, lm_head: torch.nn.Module, device: torch.device) -> int:
    """Return in how many chunks a process passes its supervised tokens through `lm_head`.

    One at least, even of no token: DDP and DeepSpeed wait for the gradients of all weights. Under ZeRO-3 each call
    gathers the weights from all processes, so all take as many chunks as the one with most.
    """
    chunks = max(1, -(-count // CHUNK_TOKENS))
    if not _is_sharded(lm_head):
        return chunks
    most = torch.tensor(chunks, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _is_sharded(module: torch.nn.Module) -> bool:
    """Return whether ZeRO-3 shards the weights of a module."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _summed_loss(
    hidden_states: torch.Tensor, targets: torch.Tensor, lm_head: torch.nn.Module, label_smoothing: float
) -> torch.Tensor:
    logits = lm_head(hidden_states).float()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def _allows_gradients_in_forward(hidden_states: torch.Tensor, lm_head: torch.nn.Module) -> bool:
    """Return whether gradients may be computed in the forward pass.

    Not in fp16, whose loss scale is known in the backward pass only. Not where ZeRO-3 shards `lm_head`: its hooks
    gather the weights in the order of the passes.
    """
    device = hidden_states.device.type
    return (
        torch.is_grad_enabled()
        and hidden_states.requires_grad
        and hidden_states.dtype != torch.float16
        and not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16)
        and not _is_sharded(lm_head)
    )


def _plain_weight(lm_head: Any) -> torch.nn.Parameter | None:
    """Return the weight of a head that is a trained `Linear` without bias or adapter, else None."""
    if isinstance(lm_head, ModulesToSaveWrapper):
        if lm_head.disable_adapters or lm_head.active_adapters != list(lm_head.modules_to_save):
            return None
        lm_head = lm_head.modules_to_save[lm_head.active_adapters[0]]
    if type(lm_head) is torch.nn.Linear and lm_head.bias is None and lm_head.weight.requires_grad:
        return lm_head.weight
    return None


def _replace_by_gradient(
    logits: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor | int, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the summed cross entropy over a divisor; overwrite `(tokens, vocabulary)` logits with their gradient.

    Bitwise equal to autograd's, which holds three more tensors of the logits' size; here they are of a few rows.
    """
    log_likelihoods = torch.empty(len(targets), 1, dtype=torch.float32, device=logits.device)
    at_once = GPU_SOFTMAX_TOKENS if logits.is_cuda else SOFTMAX_TOKENS
    for start in range(0, len(targets), at_once):
        place = slice(start, start + at_once)
        with torch.enable_grad():
            rows = logits[place].detach().requires_grad_()
            losses = F.cross_entropy(rows.float(), targets[place], reduction="none", label_smoothing=label_smoothing)
            loss = losses.sum() / divisor
        log_likelihoods[place, 0] = -losses.detach()
        (logits[place],) = torch.autograd.grad(loss, rows)
    return F.nll_loss(log_likelihoods, torch.zeros_like(targets), reduction="sum") / divisor


class _LossWithGradient(torch.autograd.Function):
    """The loss of hidden states over a divisor, whose gradients are there when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        lm_head: torch.nn.Module,
        divisor: torch.Tensor | int,
        weight: torch.Tensor | None,
        label_smoothing: float,
    ) -> torch.Tensor:
        """Return the loss, a float32 scalar, of `(supervised, hidden)` states and `(supervised,)` targets.

        `weight` is that of `lm_head`, (vocabulary, hidden), where it is trained.
        """
        total = hidden_states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden_states)
        weight_gradient = None if weight is None else torch.zeros_like(weight)
        for start in range(0, len(targets), CHUNK_TOKENS):
            place = slice(start, start + CHUNK_TOKENS)
            with torch.enable_grad():
                chunk = hidden_states[place].detach().requires_grad_()
                logits = lm_head(chunk)
            of_logits = logits.detach()
            total += _replace_by_gradient(of_logits, targets[place], divisor, label_smoothing)
            (gradient[place],) = torch.autograd.grad(logits, chunk, of_logits)
            if weight_gradient is not None:
                _add_product(weight_gradient, of_logits, chunk.detach())
            del logits, of_logits  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        ctx.weight_gradient = weight_gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the hidden states and of the weight."""
        (gradient,) = ctx.saved_tensors
        weight_gradient, ctx.weight_gradient = ctx.weight_gradient, None
        if weight_gradient is not None:
            weight_gradient *= outputs[0]  # in place: it is as large as the weight
        return (gradient.float() * outputs[0]).to(gradient.dtype), None, None, None, weight_gradient, None


def _add_product(total: torch.Tensor, of_logits: torch.Tensor, hidden_states: torch.Tensor) -> None:
    """Add the weight's gradient that a chunk of logits gives to `total`, in its place."""
    with torch.autocast(total.device.type, enabled=False):
        if total.dtype == of_logits.dtype:
            total.addmm_(of_logits.t(), hidden_states.to(of_logits.dtype))
        else:
            total += of_logits.t() @ hidden_states.to(of_logits.dtype)
