"""Processes that are measured from outside, one after another."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Finished:
    """A process that ended well.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: processor time of it and of the processes that it waited for.
        peak_bytes: the most memory that it, or one of those, held.
        output: what it wrote to stdout.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def run_process(
    command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path = ROOT, *, expected: int = 0
) -> Finished:
    """Run a command and return what it took. Ends this program where the command's exit code is not `expected`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | dict(environment or {}), cwd=folder, stdout=output, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != expected:
            errors.seek(max(0, errors.tell() - 20_000))
            text = errors.read().decode(errors="replace")
            sys.exit(f"{text}\nexit code {process.returncode}: {' '.join(command)}")
        output.seek(0)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        text = output.read().decode(errors="replace")
        return Finished(seconds, usage.ru_utime + usage.ru_stime, peak, text)


def in_turn(count: int, *measurements: Callable[[], Measured]) -> list[list[Measured]]:
    """Measure `count` rounds, in each every measurement once, every other round backwards; return a list for each."""
    found: list[list[Measured]] = [[] for _ in measurements]
    for number in range(count):
        order = list(enumerate(measurements))
        for place, measure in order if number % 2 == 0 else reversed(order):
            found[place].append(measure())
    return found


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over the rounds of ours / theirs."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
