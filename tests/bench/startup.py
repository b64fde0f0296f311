"""How long one waits: for the help, for a mistake in the config, and for the first training step.

    python -m tests.bench.startup

Each is a process of its own, timed from its start to its end or to the line of the step on its output, and beside it
what the machine takes to import torch and transformers.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.measure import ROOT, in_turn, median_ratio, run_process
from tests.bench.result import Ratio, Result, Table, keep

EXIT_USER_ERROR = 2
FLOOR = "import torch, transformers"
DEMO = ("finetune.py", "data/demo", "glm-edge-nano", "configs/demo.yaml")
ONE_STEP = {
    "max_steps": "1",
    "logging_steps": "1",
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": "false",
}


def seconds_of(*command: str, expected: int = 0) -> float:
    """Return how long a Python command takes from start to end."""
    return run_process([sys.executable, *command], expected=expected).seconds


def seconds_to_first_step(cache: Path | None = None) -> float:
    """Return how long the demonstration takes until the line of its first step is out; an empty cache by default."""
    with tempfile.TemporaryDirectory() as work:
        settings = ONE_STEP | {"output_dir": f"{work}/output"}
        options = [part for key, value in settings.items() for part in ("--set", f"training_args.{key}={value}")]
        command = [sys.executable, *DEMO, *options, "--set", "data_config.test_file=null"]
        environment = os.environ | {"GLM_EDGE_FT_CACHE": str(cache or f"{work}/cache"), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        with (
            Path(os.devnull).open("wb") as unread,
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=unread) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(b"step 1/1"):
                    seconds = time.perf_counter() - start
                    process.kill()  # what follows, such as saving the model, is not waited for
                    break
            else:
                sys.exit(f"no line of a step: {' '.join(command)}")
    return seconds


def main(*, rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 5) -> None:
    """Measure in turn and keep the result."""
    with tempfile.TemporaryDirectory() as work:
        cache = Path(work) / "cache"
        seconds_to_first_step(cache)  # fills it, and Python's own cache of compiled files
        mistake = (*DEMO, "--set", "training_args.learning_rat=1e-4")
        cases: dict[str, tuple[float | None, Callable[[], float]]] = {
            f'`python -c "{FLOOR}"`': (None, partial(seconds_of, "-c", FLOOR)),
            "`--help`": (1.0, partial(seconds_of, "finetune.py", "--help")),
            "a mistake in the config is shown": (2.0, partial(seconds_of, *mistake, expected=EXIT_USER_ERROR)),
            "first step of the demo, nothing cached": (15.0, seconds_to_first_step),
            "first step of the demo, data cached": (15.0, partial(seconds_to_first_step, cache)),
        }
        found = dict(zip(cases, in_turn(rounds, *(measure for _, measure in cases.values())), strict=True))
    floor, *names = cases
    ratios = [Ratio(name, statistics.median(found[name]), cases[name][0], at_least=False, unit="s") for name in names]
    rows: list[list[str | float]] = [
        [name, statistics.median(each), min(each), max(each), median_ratio(each, found[floor])]
        for name, each in found.items()
    ]
    columns = ("what", "median (s)", "least (s)", "most (s)", "/ importing torch and transformers")
    keep(
        Result(
            name="startup",
            title="Starting",
            command="python -m tests.bench.startup",
            ratios=ratios,
            tables=[Table(columns, rows)],
            notes=[
                f"Median of {rounds} processes each, one kind after another in turn. The step is a whole training step "
                "of the demonstration (16 rows, LoRA), without evaluations; nothing cached: the data is encoded first.",
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
