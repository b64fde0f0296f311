"""What settings that trade time for memory cost and save: each against the same run without it.

    python -m tests.bench.levers [--steps 20] [--rounds 2] [--length 1024]

A lever is an entry of `LEVERS`: keys of the config that switch it on, and what both runs share.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.bench.growth import PROMPT_TOKENS, long_workload
from tests.bench.measure import median_ratio
from tests.bench.own_runs import OwnRun, Throughput, own_run
from tests.bench.result import Ratio, Result, Table, keep
from tests.bench.slices import side_by_side
from tests.bench.workload import make_workload


@dataclass(frozen=True)
class Lever:
    """A setting that is compared with its absence.

    Attributes:
        name: in the table.
        top: keys of the config that switch it on.
        training: keys of its `training_args` that do.
        without: keys of `training_args` that switch it off, where leaving it out does not.
        is_mixed: whether rows have every length, 16 of them a step in random order; else four of one length.
    """

    name: str
    top: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, Any] = field(default_factory=dict)
    is_mixed: bool = False


LEVERS = (
    Lever("activation_checkpointing", training={"activation_checkpointing": True}),
    Lever("padding_free, rows in random order", top={"padding_free": True}, is_mixed=True),
    Lever("quantization: nf4", top={"quantization": "nf4"}),
)


def _pair(on: Callable[..., OwnRun], off: Callable[..., OwnRun]) -> tuple[Throughput, Throughput]:
    """Return what two runs reach side by side."""
    with tempfile.TemporaryDirectory() as with_it, tempfile.TemporaryDirectory() as without:
        runs = on(work=Path(with_it)), off(work=Path(without))
        first, second = side_by_side(*(run.process for run in runs))
        return runs[0].reached(first), runs[1].reached(second)


def main(
    *,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 20,
    rounds: Annotated[int, typer.Option(help="Runs of each kind.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens of a row; four rows make a step.")] = 1024,
) -> None:
    """Measure all levers and keep the result."""
    ratios: list[Ratio] = []
    rows: list[tuple[str | float, ...]] = []
    with tempfile.TemporaryDirectory() as work:
        make_workload(Path(work) / "source", 2000)
        mixed = Path(work) / "source"
        long = long_workload(Path(work) / "long", mixed)
        lengths = {"max_input_length": PROMPT_TOKENS, "max_output_length": length - PROMPT_TOKENS}
        for lever in LEVERS:
            workload = mixed if lever.is_mixed else long
            top: dict[str, Any] = {} if lever.is_mixed else lengths
            shared: dict[str, Any] = {"per_device_train_batch_size": 4}
            if lever.is_mixed:
                shared = {"train_sampling_strategy": "random"}
            off = partial(own_run, workload=workload, steps=steps, top=top, **shared, **lever.without)
            on = partial(own_run, workload=workload, steps=steps, top={**top, **lever.top}, **shared, **lever.training)
            with_it, without = zip(*(_pair(on, off) for _ in range(rounds)), strict=True)
            speeds = [[run.tokens_per_second for run in runs] for runs in (without, with_it)]
            peaks = [[run.peak_bytes for run in runs] for runs in (with_it, without)]
            ratios.append(Ratio(f"{lever.name}: time of a step, with / without", median_ratio(*speeds)))
            ratios.append(Ratio(f"{lever.name}: peak memory, with / without", median_ratio(*peaks)))
            medians = [statistics.median(values) for values in (*reversed(speeds), *peaks)]
            rows.append((lever.name, medians[0], medians[1], medians[2] / 2**20, medians[3] / 2**20))
    columns = ("lever", "tokens/s with", "without", "peak with, MiB", "without")
    keep(
        Result(
            name="levers",
            title="What memory costs",
            command=f"python -m tests.bench.levers --steps {steps} --rounds {rounds} --length {length}",
            ratios=ratios,
            tables=[Table(columns, rows)],
            notes=[
                f"LoRA in float32 on the CPU, four rows of {length:,} tokens a step (padding_free: 16 of about 90), "
                f"{steps} steps; runs of each kind: {rounds}, side by side, two seconds each in turn. The peak is that "
                "of the process, some 500 MiB of which are libraries. A base in 4 bits is computed slowly on a CPU."
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
