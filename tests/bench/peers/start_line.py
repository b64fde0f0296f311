"""Lets a training process wait at its first step and after its last one for the program that measures it.

Imported where `BENCH_PROGRESS` names a file: it gets a letter for each step, and one in front and at the end, behind
which the process stops itself until it is continued. Needs nothing of this project.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

BEGIN, STEP, END = "b", "s", "e"


def say(letter: str) -> None:
    """Add a letter to the file of the measuring program."""
    with Path(os.environ["BENCH_PROGRESS"]).open("a", encoding="ascii") as file:
        file.write(letter)


def wait(letter: str) -> None:
    """Say where this process is, and stop until it is continued, with the processes that it has started."""
    say(letter)
    os.killpg(os.getpgrp(), signal.SIGSTOP)


def hold_training() -> None:
    """Make every Trainer of this process wait, where a program measures it in slices."""
    if "BENCH_PROGRESS" not in os.environ:
        return
    from transformers import Trainer, TrainerCallback

    class StartLine(TrainerCallback):
        """Tells of the training's begin, steps and end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Wait for the start."""
            wait(BEGIN)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Tell of a step."""
            say(STEP)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            """Wait for the clock to be read."""
            wait(END)

    inner_loop = Trainer._inner_training_loop

    def held_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(StartLine())
        return inner_loop(self, *args, **kwargs)

    Trainer._inner_training_loop = held_loop  # type: ignore[method-assign]
