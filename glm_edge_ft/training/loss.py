"""Cross entropy on supervised tokens only.

A chat row has few supervised tokens, and GLM-Edge has a vocabulary of 59,264: logits for every position would be by
far the largest tensor of a step. Here the hidden states are selected before `lm_head`, and the loss is summed over
chunks of them.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED_LABEL = -100
CHUNK_TOKENS = 512  # 512 x 59,264 logits are 121 MB in float32


def supervised_cross_entropy(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: torch.nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the next-token cross entropy over the supervised tokens, in float32.

    Equal to `transformers.loss.loss_utils.ForCausalLMLoss` on full logits, up to the order of summation.

    Args:
        hidden_states: `(batch, length, hidden)`, the decoder's last hidden states.
        labels: `(batch, length)`, token ids, -100 where nothing is taught. Position t+1 is the target of position t.
        lm_head: called as a module, so that adapters on it and sharded weights take part.
        num_items_in_batch: the number of supervised tokens of the whole optimizer step; the sum is divided by it, which
            makes gradient accumulation exact. None: the number in this batch.

    Returns:
        A scalar; 0.0, still attached to the graph, when nothing is supervised.
    """
    targets = labels[:, 1:]
    is_supervised = targets != IGNORED_LABEL
    selected = hidden_states[:, :-1][is_supervised]  # (supervised, hidden)
    targets = targets[is_supervised]
    count = targets.numel()
    if count == 0:
        return hidden_states.float().sum() * 0.0
    if count <= CHUNK_TOKENS:
        total = _summed_loss(selected, targets, lm_head)
    else:
        total = selected.new_zeros((), dtype=torch.float32)
        for hidden_chunk, target_chunk in zip(selected.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            if torch.is_grad_enabled():  # the chunk's logits are computed again in the backward pass instead of kept
                total = total + checkpoint(_summed_loss, hidden_chunk, target_chunk, lm_head, use_reentrant=False)
            else:
                total = total + _summed_loss(hidden_chunk, target_chunk, lm_head)
    return total / (count if num_items_in_batch is None else num_items_in_batch)


def _summed_loss(hidden_states: torch.Tensor, targets: torch.Tensor, lm_head: torch.nn.Module) -> torch.Tensor:
    return F.cross_entropy(lm_head(hidden_states).float(), targets, reduction="sum")


def install_supervised_loss(model: PreTrainedModel) -> None:
    """Make `model` compute `supervised_cross_entropy` when called with labels; its outputs then hold no logits.

    `model` is the causal language model itself, not its PEFT, DDP or DeepSpeed wrapper: those call its `forward`, so
    the loss is computed inside their hooks. Calls without labels, `generate` among them, are left as they were.
    """
    original = type(model).forward

    @functools.wraps(original)  # the Trainer and `generate` read the signature
    def forward(self: PreTrainedModel, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Compute the loss where there are labels; else do as before."""
        if labels is None:
            return original(self, *args, **kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("logits_to_keep", None)
        kwargs["use_cache"] = False
        outputs = self.get_decoder()(*args, **kwargs)
        loss = supervised_cross_entropy(
            outputs.last_hidden_state, labels, self.get_output_embeddings(), num_items_in_batch
        )
        return CausalLMOutputWithPast(loss=loss)

    model.forward = types.MethodType(forward, model)
