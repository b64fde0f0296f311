"""Counts what a trainer that is built on transformers' trains, how long it takes and how much memory it holds.

Imported by the peers' scripts, which stand beside it; it needs transformers and nothing of this project. Where a
program measures in slices, it takes the seconds itself.
"""

from __future__ import annotations

import json
import resource
import time
from typing import Any

from start_line import hold_training
from transformers import Trainer, TrainerCallback

IGNORED_LABEL = -100


class Counts:
    """What was seen so far; times are those of `time.time()`."""

    def __init__(self) -> None:
        self.steps = self.real_tokens = self.slots = self.supervised = self.trainable = 0
        self.begin = self.end = 0.0
        self.history: list[dict[str, Any]] = []
        self.dtype = ""


COUNTS = Counts()


class _Clock(TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        COUNTS.begin = time.time()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        COUNTS.end = time.time()
        COUNTS.history = state.log_history


def count_training() -> None:
    """Make every Trainer of this process count."""
    training_step, inner_loop = Trainer.training_step, Trainer._inner_training_loop

    def counting_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        labels, mask, ids = inputs["labels"], inputs.get("attention_mask"), inputs["input_ids"]
        COUNTS.real_tokens += _real_tokens(ids, mask)
        COUNTS.slots += ids.numel()
        COUNTS.supervised += int((labels != IGNORED_LABEL).sum())
        COUNTS.steps += 1
        COUNTS.trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        COUNTS.dtype = str(next(model.parameters()).dtype)
        return training_step(self, model, inputs, *args, **kwargs)

    def timed_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(_Clock())
        return inner_loop(self, *args, **kwargs)

    Trainer.training_step = counting_step  # type: ignore[method-assign]
    Trainer._inner_training_loop = timed_loop  # type: ignore[method-assign]
    hold_training()


def _real_tokens(ids: Any, mask: Any) -> int:
    """Return the tokens that are no padding; a mask of four dimensions says of each token whether it sees itself."""
    if mask is None:
        return int(ids.numel())
    if mask.dim() == 4:
        diagonal = mask.diagonal(dim1=-2, dim2=-1)
        return int((diagonal == 0).sum() if mask.dtype.is_floating_point else diagonal.sum())
    return int((mask != 0).sum())


def report(started: float, imported: float) -> None:
    """Print one line of JSON: seconds of import, preparation and training, tokens, and the peak of memory in bytes."""
    record = {
        "import_seconds": round(imported - started, 2),
        "prepare_seconds": round(COUNTS.begin - imported, 2),
        "train_seconds": round(COUNTS.end - COUNTS.begin, 2),
        "steps": COUNTS.steps,
        "real_tokens": COUNTS.real_tokens,
        "slots": COUNTS.slots,
        "supervised": COUNTS.supervised,
        "trainable": COUNTS.trainable,
        "dtype": COUNTS.dtype,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": [event["loss"] for event in COUNTS.history if "loss" in event],
    }
    print("\nRESULT " + json.dumps(record), flush=True)
