"""Where the seconds of a training step go, by kind of operation.

    python -m tests.bench.step_profile [--steps 12] [--workload FOLDER]

A run of `finetune.py` on the workload of `tests.bench.training`, ours as it comes, under PyTorch's profiler.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.measure import run_process
from tests.bench.own_runs import flops_of, own_run, products_alone
from tests.bench.result import Result, Table, keep
from tests.bench.slices import side_by_side
from tests.bench.step_profile_process import LARGE
from tests.bench.workload import make_workload

WARM_UP_STEPS = 6


def main(
    *,
    steps: Annotated[int, typer.Option(help="Steps that are profiled.")] = 12,
    workload: Annotated[Path | None, typer.Option(help="Folder of a workload that is there already.")] = None,
) -> None:
    """Profile and keep the result."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = workload or Path(temporary) / "workload"
        if workload is None:
            make_workload(folder, 4000)
        last = WARM_UP_STEPS + steps
        own = own_run(Path(temporary), folder, last + 1)
        end = own.process.command[-3:]
        command = [sys.executable, "-m", "tests.bench.step_profile_process", str(WARM_UP_STEPS + 1), str(last), *end]
        output = run_process(command, own.process.environment).output
        (products,) = side_by_side(products_alone(50))
    (line,) = (line for line in output.splitlines() if line.startswith("RESULT "))
    record = json.loads(line.removeprefix("RESULT "))
    wall, seconds = record["wall"], record["seconds"]
    seconds["between the operations, and the profiler itself"] = wall - sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    keep(
        Result(
            name="step_profile",
            title="Where a step's time goes",
            command=f"python -m tests.bench.step_profile --steps {steps}",
            tables=[
                Table(
                    ("kind of operation", "seconds", "share"),
                    [(kind, taken, f"{100 * taken / wall:.1f} %") for kind, taken in ordered],
                )
            ],
            notes=[
                f"The training workload, ours as it comes, {steps} steps; the profiler itself makes them slower.",
                f"The model's products ran at {record['flop'] / seconds[LARGE] / 1e9:.0f} GFLOPS, products alone right "
                f"after it at {flops_of(products) / 1e9:.0f}. What is left beside them is what LoRA, attention, norms, "
                "SwiGLU, the rotary embedding and the loss need: hence the distance to the limit, and why peers, whose "
                "products are the same, cannot be left behind without end.",
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
