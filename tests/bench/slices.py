"""Processes that are measured side by side: each runs alone for a while, then waits while the others run.

The machine's slow and fast moments, which last from seconds to hours where others share it, so meet all alike. A
process writes how far it is to the file in `BENCH_PROGRESS` and stops itself in front of and behind what is measured
(`peers/start_line.py`); it is stopped and continued with signals, which costs it nothing but its processor caches.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.bench.measure import ROOT
from tests.bench.peers.start_line import BEGIN, END, STEP

SLICE_SECONDS = 2.0
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Sliced:
    """A process to be measured.

    Attributes:
        command: with its arguments.
        steps: how many it tells of between its begin and its end.
        environment: variables beside those of this process.
        folder: in which it runs.
    """

    command: Sequence[str]
    steps: int
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = ROOT


@dataclass(frozen=True)
class Measured:
    """What a process took.

    Attributes:
        seconds: that it was let run between its begin and its end.
        peak_bytes: the most memory that it held.
        output: what it wrote to stdout.
    """

    seconds: float
    peak_bytes: int
    output: str


class _Process:
    """A started process, stopped but for the time in which it is let run."""

    def __init__(self, what: Sliced, folder: Path, number: int) -> None:
        self.what = what
        self.seconds = 0.0
        self.progress = folder / f"progress_{number}"
        self.progress.touch()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            what.command,
            env=os.environ | dict(what.environment) | {"BENCH_PROGRESS": str(self.progress)},
            cwd=what.folder,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,
        )

    @property
    def is_at_end(self) -> bool:
        return self.progress.read_text(encoding="ascii").endswith(END)

    @property
    def share_done(self) -> float:
        return self.progress.read_text(encoding="ascii").count(STEP) / self.what.steps

    def prepare(self) -> None:
        """Let it come to its begin."""
        while not self.progress.read_text(encoding="ascii").startswith(BEGIN):
            self._stops(os.WUNTRACED)

    def run_slice(self, seconds: float) -> None:
        """Let it run for `seconds`, or until it comes to its end."""
        start = time.perf_counter()
        os.killpg(self._process.pid, signal.SIGCONT)
        while time.perf_counter() - start < seconds:
            if self._stops(os.WUNTRACED | os.WNOHANG):
                self.seconds += time.perf_counter() - start
                return
            time.sleep(POLL_SECONDS)
        os.killpg(self._process.pid, signal.SIGSTOP)
        self.seconds += time.perf_counter() - start
        self._stops(os.WUNTRACED)

    def finish(self) -> Measured:
        """Let it go on to its exit."""
        os.killpg(self._process.pid, signal.SIGCONT)
        _, status, usage = os.wait4(self._process.pid, 0)
        self._note_exit(status)
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Measured(self.seconds, peak, text)

    def kill(self) -> None:
        """End it in any state."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _stops(self, options: int) -> bool:
        """Return whether it has stopped; ends this program where it has exited."""
        process_id, status = os.waitpid(self._process.pid, options)
        if process_id and not os.WIFSTOPPED(status):
            self._note_exit(status)
            sys.exit(f"ended before its time: {' '.join(self.what.command)}")
        return process_id != 0

    def _note_exit(self, status: int) -> None:
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace")[-20_000:]
            sys.exit(f"{text}\nexit code {self._process.returncode}: {' '.join(self.what.command)}")


def side_by_side(*processes: Sliced) -> list[Measured]:
    """Run all in slices, so that they come to their ends together; return what each took."""
    started: list[_Process] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, what in enumerate(processes):
                started.append(_Process(what, Path(folder), number))
                started[-1].prepare()
            while running := [process for process in started if not process.is_at_end]:
                min(running, key=lambda process: process.share_done).run_slice(SLICE_SECONDS)
            return [process.finish() for process in started]
        finally:
            for process in started:
                process.kill()
