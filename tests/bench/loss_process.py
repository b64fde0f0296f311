"""One forward and backward pass of the loss in a process of its own; started by `tests.bench.loss`.

    python -m tests.bench.loss_process WHOSE TOKENS HIDDEN VOCABULARY HEAD FILE

WHOSE is `ours`, or `full`: the logits of all positions and transformers' `ForCausalLMLoss`. HEAD is `frozen` or
`trained`. Prints one line of JSON: seconds of both passes, the peak of resident memory (VmHWM) above what the process
had before them, and the loss; writes the gradients to FILE.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from glm_edge_ft.training.loss import find_supervised, supervised_cross_entropy
from tests.model.measure_memory import memory_status, reset_peak


def loss_of(whose: str, hidden_states: torch.Tensor, labels: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """Return the loss, a scalar, of `(1, length, hidden)` states and `(1, length)` labels."""
    if whose == "ours":
        positions, targets = find_supervised(labels)
        return supervised_cross_entropy(hidden_states.flatten(0, 1).index_select(0, positions), targets, head)
    from transformers.loss.loss_utils import ForCausalLMLoss

    loss: torch.Tensor = ForCausalLMLoss(head(hidden_states), labels, head.out_features)
    return loss


def main() -> None:
    """Measure and report."""
    whose, head_kind, file = sys.argv[1], sys.argv[5], sys.argv[6]
    tokens, hidden, vocabulary = (int(text) for text in sys.argv[2:5])
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False)
    head.requires_grad_(head_kind == "trained")
    hidden_states = torch.randn(1, tokens + 1, hidden, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens + 1))
    loss_of(whose, hidden_states[:, :9], labels[:, :9], head).backward()  # what libraries allocate once
    hidden_states.grad = head.weight.grad = None
    reset_peak()
    before = memory_status("VmRSS")
    start = time.perf_counter()
    loss = loss_of(whose, hidden_states, labels, head)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = memory_status("VmHWM") - before
    gradients = [tensor.grad for tensor in (hidden_states, head.weight) if tensor.grad is not None]
    torch.save([gradient[..., :: max(1, hidden // 64)].clone() for gradient in gradients], file)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "loss": loss.item()}))


if __name__ == "__main__":
    main()
