"""Memory and time of the loss: ours against the logits of all positions, forward and backward.

    python -m tests.bench.loss

All tokens are supervised, which is the hardest case for ours; hidden size and vocabulary are those of GLM-Edge 1.5B, in
float32. Each pass is measured in a process of its own, and the gradients of both are compared.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.measure import in_turn, median_ratio, run_process
from tests.bench.result import Ratio, Result, Table, keep

HEADS = {"frozen": "`lm_head` frozen, as with LoRA", "trained": "`lm_head` trained"}
RELATIVE_TOLERANCE = 1e-4  # of the largest gradient: sums in float32, in another order


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass took.

    Attributes:
        seconds: of both.
        peak_bytes: resident memory at its most, above what there was before.
        loss: its value.
        gradients: the file that they are in.
    """

    seconds: float
    peak_bytes: int
    loss: float
    gradients: Path


def run(work: Path, shape: tuple[int, int, int], head: str, whose: str) -> Pass:
    """Measure one pass over `(tokens, hidden, vocabulary)`."""
    file = work / f"{whose}-{head}.pt"
    command = [sys.executable, "-m", "tests.bench.loss_process", whose, *map(str, shape), head, str(file)]
    # Each large tensor has pages of its own that go back to the system as it is freed, for both.
    record = json.loads(run_process(command, {"MALLOC_MMAP_THRESHOLD_": "65536"}).output.splitlines()[-1])
    return Pass(record["seconds"], record["peak_bytes"], record["loss"], file)


def check_same(ours: Pass, full: Pass) -> float:
    """Return the largest relative difference of losses and gradients. Ends the program where it is too large."""
    import torch

    pairs = zip(torch.load(ours.gradients), torch.load(full.gradients), strict=True)
    differences = [float((one - other).abs().max() / other.abs().max()) for one, other in pairs]
    largest = max(abs(ours.loss / full.loss - 1), *differences)
    if largest > RELATIVE_TOLERANCE:
        sys.exit(f"losses or gradients differ by {largest:.1e} of their size")
    return largest


def main(
    *,
    tokens: Annotated[int, typer.Option(help="Supervised tokens.")] = 8192,
    hidden: Annotated[int, typer.Option(help="Width of the hidden states.")] = 2048,
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 59264,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 3,
) -> None:
    """Measure both heads, compare the gradients and keep the result."""
    logits_bytes = tokens * vocabulary * 4
    ratios, measured = [], {}
    rows: list[list[str | float]] = []
    with tempfile.TemporaryDirectory() as work:
        for head in HEADS:
            passes = [partial(run, Path(work), (tokens, hidden, vocabulary), head, whose) for whose in ("ours", "full")]
            measured[head] = in_turn(rounds, *passes)
        differences = [check_same(ours[-1], full[-1]) for ours, full in measured.values()]
    for head, (ours, full) in measured.items():
        name = f"loss of {tokens:,} tokens, {HEADS[head]}"
        # A trained head's own gradient is as large in any way of computing the loss.
        own = hidden * vocabulary * 4 if head == "trained" else 0
        extra, peer = (statistics.median(one.peak_bytes - own for one in each) for each in (ours, full))
        seconds = [[one.seconds for one in each] for each in (ours, full)]
        ratios += [
            Ratio(f"{name}: extra memory / size of the full logits", extra / logits_bytes, 0.2, at_least=False),
            Ratio(f"{name}: extra memory / full logits with ForCausalLMLoss", extra / peer),
            Ratio(f"{name}: seconds / full logits with ForCausalLMLoss", median_ratio(*seconds)),
        ]
        rows.append([HEADS[head], extra / 1e6, peer / 1e6, *(statistics.median(each) for each in seconds)])
    columns = ("case", "ours (MB)", "full logits (MB)", "ours (s)", "full logits (s)")
    keep(
        Result(
            name="loss",
            title="The loss",
            command=f"python -m tests.bench.loss --rounds {rounds}",
            ratios=ratios,
            tables=[Table(columns, rows)],
            notes=[
                f"{tokens:,} supervised tokens, hidden size {hidden:,}, vocabulary {vocabulary:,}, float32: the full "
                f"logits are {logits_bytes / 1e9:.2f} GB. Memory is the peak of what is resident (VmHWM) in forward "
                "and backward pass above what the process had before; a trained head's gradient "
                f"({hidden * vocabulary * 4 / 1e6:.0f} MB, the same for both) is taken off.",
                f"Loss and gradients were compared: the largest difference is {max(differences):.0e} of their size.",
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
