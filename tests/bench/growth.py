"""Training throughput against the number of rows and against the length of rows.

    python -m tests.bench.growth [--rows 1000 --rows 20000 --rows 200000] [--steps 50] [--rounds 2] [--longest 4096]

Each measurement is a real run of `finetune.py` (LoRA, float32) in a process of its own: real tokens over the seconds of
the training loop, start and encoding left out. Runs of different numbers of rows take turns of two seconds, and so do
those of one length and matrix products alone (`slices.py`).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.measure import median_ratio, run_process
from tests.bench.own_runs import Throughput, count_parameters, flops_of, own_run, products_alone
from tests.bench.result import Plot, Ratio, Result, Table, keep
from tests.bench.slices import side_by_side
from tests.bench.workload import make_rows, make_workload, write_rows

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOKENS_OF_A_STEP = 4096
PROMPT_TOKENS = 64
HIDDEN, LAYERS = 512, 8  # of the workload's model
SAMPLER = """
import sys, time
from glm_edge_ft.data.dataset import EncodedDataset
from glm_edge_ft.training.sampling import LengthGroupedEpochSampler
from pathlib import Path
lengths = max((EncodedDataset(path.parent).lengths for path in Path(sys.argv[1]).rglob("meta.json")), key=len)
start = time.perf_counter()
count = len(list(LengthGroupedEpochSampler(lengths, 16, 0)))
print(count, time.perf_counter() - start)
"""


def long_workload(folder: Path, source: Path) -> Path:
    """Write rows that are longer than any length that is measured, beside the model of another workload."""
    reply = "".join(message["content"] for row in make_rows(600) for message in row["messages"])
    rows = [
        [{"role": "user", "content": f"第{number}件"}, {"role": "assistant", "content": reply[number:][: 4 * 4096]}]
        for number in range(400)
    ]
    write_rows(folder / "data" / "train.jsonl", [{"messages": messages} for messages in rows])
    (folder / "model").symlink_to(source / "model")
    return folder


def speed_at(workload: Path, length: int, steps: int) -> tuple[float, float]:
    """Return tokens per second with rows of about `length` tokens, 4,096 tokens in a step, and FLOP/s of products."""
    lengths = {"max_input_length": PROMPT_TOKENS, "max_output_length": length - PROMPT_TOKENS}
    with tempfile.TemporaryDirectory() as work:
        batch = TOKENS_OF_A_STEP // length
        own = own_run(Path(work), workload, steps, lengths, per_device_train_batch_size=batch)
        measured, products = side_by_side(own.process, products_alone(steps))
        return own.reached(measured).tokens_per_second, flops_of(products)


def speeds_of(workloads: Sequence[Path], steps: int) -> list[Throughput]:
    """Return what runs on each of the workloads reach side by side."""
    with tempfile.TemporaryDirectory() as work:
        runs = []
        for number, workload in enumerate(workloads):
            (folder := Path(work) / str(number)).mkdir()
            runs.append(own_run(folder, workload, steps))
        measured = side_by_side(*(run.process for run in runs))
        return [run.reached(one) for run, one in zip(runs, measured, strict=True)]


def limit_at(flops: float, parameters: int, length: int) -> float:
    """Return tokens per second if nothing were computed but the matrix products of LoRA, those of attention included.

    4 FLOP a weight and token: forward, and backward to the inputs. Attention: each token sees half the row on average,
    2 products forward and 4 backward.
    """
    return flops / (4 * parameters + 6 * length * HIDDEN * LAYERS)


def main(
    *,
    rows: Annotated[list[int] | None, typer.Option(help="Numbers of rows, the smallest first.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each run on them.")] = 50,
    rounds: Annotated[int, typer.Option(help="Runs of each kind.")] = 2,
    longest: Annotated[int, typer.Option(help="Longest rows of the curve.")] = LENGTHS[-1],
) -> None:
    """Measure both curves and keep the result."""
    counts = rows or [1000, 20000, 200000]
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        make_workload(source, 2000)
        folders, samplers = [], []
        for count in counts:
            folder = Path(work) / str(count)
            write_rows(folder / "data" / "train.jsonl", make_rows(count))
            (folder / "model").symlink_to(source / "model")
            speeds_of([folder], 1)  # encodes
            folders.append(folder)
            samplers.append(run_process([sys.executable, "-c", SAMPLER, str(folder / "cache")]).output.split())
        found = list(zip(*(speeds_of(folders, steps) for _ in range(rounds)), strict=True))
        speeds = [[run.tokens_per_second for run in of_count] for of_count in found]
        parameters = count_parameters(source)
        lengths = [length for length in LENGTHS if length <= longest]
        long_rows = long_workload(Path(work) / "long", source)
        reached = {length: speed_at(long_rows, length, 10) for length in lengths}
    at_length = [(length, speed) for length, (speed, _) in reached.items()]
    limits = [(length, limit_at(flops, parameters, length)) for length, (_, flops) in reached.items()]
    least = min(median_ratio(of_count, speeds[0]) for of_count in speeds[1:])
    command = " ".join(["python -m tests.bench.growth", *(f"--rows {count}" for count in counts)])
    keep(
        Result(
            name="growth",
            title="Throughput as data and rows grow",
            command=f"{command} --steps {steps} --rounds {rounds} --longest {longest}",
            ratios=[
                Ratio(f"tokens a second, slowest of {counts[1]:,} to {counts[-1]:,} rows / {counts[0]:,}", least, 0.95),
                Ratio(f"order of an epoch of {int(samplers[-1][0]):,} rows", float(samplers[-1][1]), unit="s"),
            ],
            tables=[
                Table(
                    ("rows", "tokens/s", "peak memory, MiB", "order of an epoch, s"),
                    [
                        (
                            count,
                            statistics.median(of_count),
                            statistics.median(run.peak_bytes for run in runs_of_count) / 2**20,
                            float(seconds),
                        )
                        for count, of_count, runs_of_count, (_, seconds) in zip(
                            counts, speeds, found, samplers, strict=True
                        )
                    ],
                ),
                Table(
                    ("tokens of a row", "tokens/s", "matrix products alone", "share"),
                    [
                        (length, speed, limit, f"{100 * speed / limit:.0f} %")
                        for (length, speed), (_, limit) in zip(at_length, limits, strict=True)
                    ],
                ),
            ],
            plots=[
                Plot(
                    "growth",
                    "LoRA throughput against the length of rows, 4,096 tokens a step",
                    "tokens of a row",
                    "real tokens/s",
                    {"ours": at_length, "matrix products alone": limits},
                    log_x=True,
                )
            ],
            notes=[
                f"Numbers of rows: {steps} steps of 16 rows as a run takes them, {rounds} runs of each, side by side, "
                "two seconds each in turn; lengths: 10 steps. The peak is that of the process.",
                "Matrix products alone (2,048 x 512 x 3,072) took turns with the run, and are counted at 4 FLOP "
                "a weight and token and those of attention.",
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
