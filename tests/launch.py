"""Whole runs in processes of their own, as users start them: with python alone, or several under torchrun.

Every start has a time limit, after which all its processes are killed: a run that hangs fails its test, and nothing of
it is left behind.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import write_config

REPOSITORY = Path(__file__).resolve().parents[1]
ZERO_2, ZERO_3 = (str(REPOSITORY / "configs" / f"ds_zero_{stage}.json") for stage in (2, 3))
SECONDS = 600  # a run takes ten, on a busy machine many times as long


@dataclass(frozen=True)
class Started:
    """A run that is going on, in processes of its own.

    Attributes:
        process: python, or torchrun, whose children are the ranks.
        log: the file that takes what all of them print, both streams together.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """Return what was printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Return torchrun's workers in the order of their ranks."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: int(child.environ().get("RANK", "0")))

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds; fail the test where the run ends before, or nothing comes of it."""
        end = time.monotonic() + SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"{what} was never seen:\n{self.said()[-6000:]}")
            time.sleep(0.05)

    def end(self, code: int | None = 0) -> str:
        """Wait for the end of the run, expect its exit code (None: any but 0), and return what was printed."""
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the run did not end within {SECONDS} seconds:\n{self.said()[-6000:]}")
        ended = self.process.returncode
        assert ended != 0 if code is None else ended == code, f"exit code {ended}:\n{self.said()[-6000:]}"
        return self.said()

    def kill(self) -> None:
        """End all processes of the run; torchrun's workers are in sessions of their own."""
        if self.process.poll() is not None:
            return
        for member in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


def start(
    output: Path,
    data: Path,
    model: Path | str,
    *,
    processes: int = 1,
    resume: str | None = None,
    script: str = "finetune.py",
    environment: Mapping[str, str] | None = None,
    **settings: Any,
) -> Started:
    """Start a run and return at once.

    Args:
        output: the output folder; the dataset cache, config and log lie beside it.
        data: DATA_DIR.
        model: MODEL.
        processes: 1: python alone; more: that many ranks under torchrun.
        resume: RESUME.
        script: which of the two scripts.
        environment: further variables.
        settings: those of `tests.runs.write_config`.
    """
    config = write_config(output, **settings)
    arguments = [str(data), str(model), str(config), *([resume] if resume else [])]
    variables = {"GLM_EDGE_FT_CACHE": str(output.parent / "cache")} | dict(environment or {})
    log = output.parent / f"{output.name}.log"
    return start_script(REPOSITORY / script, arguments, log, processes=processes, environment=variables)


def start_script(
    script: Path, arguments: Sequence[str], log: Path, *, processes: int, environment: Mapping[str, str]
) -> Started:
    """Start a script by python alone, or in several processes under torchrun, and return at once.

    Args:
        script: the script.
        arguments: those of its command line.
        log: takes what is printed.
        processes: 1: python alone; more: that many ranks under torchrun.
        environment: further variables.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]
    return _start([*(launcher if processes > 1 else []), str(script), *arguments], log, environment)


def start_machines(
    script: Path, arguments: Sequence[Sequence[str]], log: Path, *, environment: Mapping[str, str]
) -> list[Started]:
    """Start a script as on several machines: a torchrun for each of them, with one process; return at once.

    Args:
        script: the script.
        arguments: those of its command line, for each machine.
        log: takes what is printed, each machine's with its number at the end of the name.
        environment: further variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nnodes={len(arguments)}", "--nproc_per_node=1"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-id=glm", f"--rdzv-endpoint=127.0.0.1:{port}"]
    return [
        _start([*launcher, str(script), *mine], log.with_name(f"{log.name}.{number}"), environment)
        for number, mine in enumerate(arguments)
    ]


def end_all(runs: Sequence[Started], code: int | None = 0) -> list[str]:
    """Wait for the end of runs as `Started.end` does, and return what each printed; where one fails, kill them all."""
    try:
        return [run.end(code) for run in runs]
    finally:
        for run in runs:
            run.kill()


def _start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Started:
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        )
    return Started(process, log)


def launch(output: Path, data: Path, model: Path | str, **options: Any) -> Path:
    """Do a whole run as `start` does, expect it to end well, and return its output folder."""
    start(output, data, model, **options).end()
    return output
