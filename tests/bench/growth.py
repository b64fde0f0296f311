"""Training throughput against the number of rows and against the length of rows.

    python -m tests.bench.growth [--rows 1000 --rows 20000 --rows 200000] [--steps 60] [--rounds 3]

Each measurement is a real run of `finetune.py` (LoRA, float32) in a process of its own. Throughput is that of the log
after the first steps: real tokens over their seconds, start and encoding left out. Runs of different numbers of rows
take rows in random order, so that their batches are alike.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tests.bench.measure import in_turn, median_ratio, run_process
from tests.bench.result import Plot, Ratio, Result, Table, keep
from tests.bench.training import CONFIG, LIMIT, count_parameters
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


def steady_tokens_per_second(
    workload: Path, steps: int, top: Mapping[str, Any] | None = None, **training: Any
) -> tuple[float, float]:
    """Train `steps` steps and return the median of the log's tokens per second without its first line, and the peak.

    Args:
        workload: a folder with `data` and `model`.
        steps: the log has a line for every tenth of them.
        top: keys of the config.
        training: keys of its `training_args`.
    """
    with tempfile.TemporaryDirectory() as work:
        arguments = CONFIG["training_args"] | {"output_dir": f"{work}/output", "max_steps": steps}
        arguments |= {"logging_steps": max(1, steps // 10)} | training
        config = Path(work) / "run.yaml"
        config.write_text(yaml.safe_dump({**CONFIG, **(top or {}), "training_args": arguments}), encoding="utf-8")
        command = [sys.executable, "finetune.py", str(workload / "data"), str(workload / "model"), str(config)]
        done = run_process(command, {"GLM_EDGE_FT_CACHE": f"{workload}/cache", "HF_HUB_OFFLINE": "1"})
        lines = (Path(work) / "output" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [event["tokens_per_second"] for event in map(json.loads, lines) if "tokens_per_second" in event]
    return statistics.median(speeds[1:]), done.peak_bytes


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


def speed_at(workload: Path, length: int, steps: int) -> float:
    """Return tokens per second with rows of about `length` tokens, 4,096 tokens in a step."""
    lengths = {"max_input_length": PROMPT_TOKENS, "max_output_length": length - PROMPT_TOKENS}
    batch = {"per_device_train_batch_size": TOKENS_OF_A_STEP // length}
    return steady_tokens_per_second(workload, steps, lengths, **batch)[0]


def limit_at(flops: float, parameters: int, length: int) -> float:
    """Return tokens per second if nothing were computed but the matrix products of LoRA, those of attention included.

    4 FLOP a weight and token: forward, and backward to the inputs. Attention: each token sees half the row on average,
    2 products forward and 4 backward.
    """
    return flops / (4 * parameters + 6 * length * HIDDEN * LAYERS)


def main(
    *,
    rows: Annotated[list[int] | None, typer.Option(help="Numbers of rows, the smallest first.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each run on them.")] = 60,
    rounds: Annotated[int, typer.Option(help="Runs of each kind, in turn.")] = 3,
    longest: Annotated[int, typer.Option(help="Longest rows of the curve.")] = LENGTHS[-1],
) -> None:
    """Measure both curves and keep the result."""
    counts = rows or [1000, 20000, 200000]
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        make_workload(source, 2000)
        runs, samplers = [], []
        for count in counts:
            folder = Path(work) / str(count)
            write_rows(folder / "data" / "train.jsonl", make_rows(count))
            (folder / "model").symlink_to(source / "model")
            run = partial(steady_tokens_per_second, folder, steps, train_sampling_strategy="random")
            run()  # encodes
            runs.append(run)
            samplers.append(run_process([sys.executable, "-c", SAMPLER, str(folder / "cache")]).output.split())
        found = in_turn(rounds, *runs)
        speeds = [[speed for speed, _ in of_count] for of_count in found]
        parameters = count_parameters(source)
        flops = float(run_process([sys.executable, "-c", LIMIT]).output)
        lengths = [length for length in LENGTHS if length <= longest]
        long_rows = long_workload(Path(work) / "long", source)
        at_length = [(length, speed_at(long_rows, length, 10)) for length in lengths]
    limits = [(length, limit_at(flops, parameters, length)) for length in lengths]
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
                            statistics.median(peak for _, peak in runs_of_count) / 2**20,
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
                f"Numbers of rows: {steps} steps of 16 rows in random order, {rounds} runs each in turn; lengths: 10 "
                "steps. The median of the log's lines, without the first. The peak is that of the process.",
                "Matrix products alone: the median of 60 of them (2,048 x 512 x 3,072) in the same run, at 4 FLOP "
                "a weight and token and those of attention.",
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
