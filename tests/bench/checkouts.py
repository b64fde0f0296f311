"""Training throughput of this checkout against another one of this project: what a change is worth.

    python -m tests.bench.checkouts FOLDER [--rounds 3] [--workload FOLDER]

Both train the workload of `tests.bench.training` in turns of two seconds. Nothing is kept; it prints a line a round.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.measure import run_process
from tests.bench.own_runs import Throughput, own_run
from tests.bench.slices import side_by_side


def compare(other: Path, workload: Path, steps: int) -> tuple[Throughput, Throughput]:
    """Return what this checkout and the other one reach side by side."""
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        own, theirs = own_run(Path(here), workload, steps), own_run(Path(there), workload, steps)
        first, second = side_by_side(own.process, replace(theirs.process, folder=other))
        return own.reached(first), theirs.reached(second)


def main(
    folder: Annotated[Path, typer.Argument(help="The other checkout, with this benchmark in it.")],
    *,
    rounds: Annotated[int, typer.Option(help="Runs of each.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 50,
    workload: Annotated[Path | None, typer.Option(help="Folder of a workload that is there already.")] = None,
) -> None:
    """Compare and print."""
    with tempfile.TemporaryDirectory() as temporary:
        if workload is None:
            run_process([sys.executable, "-m", "tests.bench.workload", temporary, "4000"])
        for _ in range(rounds):
            ours, theirs = compare(folder.resolve(), (workload or Path(temporary)).resolve(), steps)
            print(
                f"{ours.tokens_per_second:,.0f} tokens/s here, {theirs.tokens_per_second:,.0f} there: "
                f"{ours.tokens_per_second / theirs.tokens_per_second:.3f}; "
                f"{ours.peak_bytes / 1e9:.2f} and {theirs.peak_bytes / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
