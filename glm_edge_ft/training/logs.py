"""What a run tells while it goes on: a line a log step, `metrics.jsonl`, and the curve in `loss.png`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm_edge_ft.files import append_text, write_text_atomically
from glm_edge_ft.training.checkpoints import CURVE_FILE, METRICS_FILE
from glm_edge_ft.training.curves import is_number, iter_metrics, write_loss_curve
from glm_edge_ft.training.metrics import METRIC_NAMES


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl` and `loss.png` on rank 0 and shows progress there.

    A resumed run keeps the lines up to its checkpoint and drops what the killed run logged after it, so that each step
    stands once in the file. A log that cannot be written, because the disk is full, does not end a run: its lines are
    kept and written with a later one.

    Args:
        output_dir: the run's folder.
        title: heading of the curve.
        show: whether to print (rank 0, and not under `disable_tqdm` for the bar).
        warn: shows one line to the user.
    """

    def __init__(self, output_dir: Path, title: str, show: bool, warn: Callable[[str], None]) -> None:
        self.metrics_file = output_dir / METRICS_FILE
        self.curve_file = output_dir / CURVE_FILE
        self.title = title
        self.show = show
        self.warn = warn
        self.waiting: list[str] = []  # lines that could not be written
        self.curve_failed = False
        self.bar: Any = None
        self.start_time = 0.0
        self.start_step = 0
        self.next_drawing = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cut `metrics.jsonl` back to the step that training starts from."""
        self.start_time, self.start_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        cut_back(self.metrics_file, state.global_step)
        if self.show and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", leave=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append the event to `metrics.jsonl` and print it as one readable line."""
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, **{key: finite_or_none(value) for key, value in logs.items()}}
        if "loss" in logs:
            record["peak_memory_bytes"] = peak_memory()
        self._write(json.dumps(record) + "\n")
        line = self._line(state, logs)
        if self.show and line:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _write(self, line: str) -> None:
        """Append a line to `metrics.jsonl`, and those before it that could not be written when they came."""
        lines = [*self.waiting, line]
        try:
            append_text(self.metrics_file, "".join(lines))
        except OSError as error:
            if not self.waiting:
                self.warn(f"{self.metrics_file} cannot be written ({error.strerror}): its lines are kept for later")
            self.waiting = lines
        else:
            if self.waiting:
                self.warn(f"{self.metrics_file}: {len(self.waiting)} lines that had to wait are written now")
            self.waiting = []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the curve again, unless that was done a moment ago."""
        self._draw_now_and_then(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the curve again, unless that was done a moment ago."""
        self._draw_now_and_then(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar and draw the whole curve."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self._draw(state)
        if self.waiting:
            self.warn(f"{self.metrics_file}: {len(self.waiting)} lines could not be written")

    def _draw_now_and_then(self, state: TrainerState) -> None:
        """Draw, unless drawing would take more than a twentieth of the run: a long log takes a second and more."""
        began = time.monotonic()
        if began >= self.next_drawing:
            self._draw(state)
            self.next_drawing = began + 20 * (time.monotonic() - began)

    def _draw(self, state: TrainerState) -> None:
        if not state.is_world_process_zero or not self.metrics_file.is_file():
            return
        try:
            write_loss_curve(iter_metrics(self.metrics_file), self.curve_file, self.title)
        except Exception as error:  # a full disk, a lack of memory, a broken matplotlib: a picture is worth no run
            if not self.curve_failed:
                self.warn(f"{self.curve_file} cannot be drawn ({type(error).__name__}: {error}): the run goes on")
            self.curve_failed = True

    def _line(self, state: TrainerState, logs: Mapping[str, Any]) -> str:
        head = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
            parts += [f"grad {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
            parts += [f"{logs['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in logs else []
            return "  ".join([head, *parts, f"left {self._time_left(state)}"])
        for prefix in ("eval", "test"):
            if f"{prefix}_loss" in logs:
                names = [name for name in ("loss", *METRIC_NAMES) if f"{prefix}_{name}" in logs]
                values = [f"{name} {logs[f'{prefix}_{name}']:.{4 if name == 'loss' else 2}f}" for name in names]
                return "  ".join([head, f"[{prefix}]", *values])
        return ""

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self.start_step
        if done <= 0:
            return "?"
        seconds = int((time.monotonic() - self.start_time) / done * (state.max_steps - state.global_step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def peak_memory() -> int | None:
    """Return the most memory that this process has held so far, in bytes: its GPU's if it uses one, else the machine's.

    None where the system does not tell.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage(2) would begin at the memory of the program that started this one
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def cut_back(metrics_file: Path, step: int) -> None:
    """Drop the lines of steps after `step`; a start from step 0 begins an empty file."""
    kept = [json.dumps(line) for line in iter_metrics(metrics_file) if step > 0 and _step(line) <= step]
    if kept or metrics_file.is_file():
        write_text_atomically(metrics_file, "".join(f"{line}\n" for line in kept))


def _step(line: Mapping[str, Any]) -> float:
    return float(line["step"]) if is_number(line.get("step")) else 0.0


def finite_or_none(value: Any) -> Any:
    """Return NaN and infinities as null: neither is JSON, and neither may look like a number that was measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def forget_evaluations(metrics_file: Path, step: int) -> None:
    """Drop the evaluations at `step`, which are about to be done again, so that each stands once in the file."""
    lines = [
        (json.dumps(line), line.get("step") == step and bool({"eval_loss", "test_loss"} & line.keys()))
        for line in iter_metrics(metrics_file)
    ]
    if any(is_left for _, is_left in lines):
        write_text_atomically(metrics_file, "".join(f"{line}\n" for line, is_left in lines if not is_left))


def format_comparison(log_history: Sequence[Mapping[str, Any]], after: Mapping[str, Any] | None) -> str:
    """Return a table of the dev metrics of the first evaluation against those of `after`, or "" without two of them.

    Args:
        log_history: the Trainer's log events, each with its `step`.
        after: the evaluation of the model that was kept.
    """
    evaluations = [event for event in log_history if "eval_loss" in event]
    if after is None or not evaluations or evaluations[0]["step"] == after["step"]:
        return ""
    before = evaluations[0]
    rows = [("metric", f"before (step {before['step']})", f"after (step {after['step']})", "change")]
    for name in ("loss", *METRIC_NAMES):
        key = f"eval_{name}"
        if key in before and key in after:
            digits = 4 if name == "loss" else 2
            old, new = before[key], after[key]
            rows.append((name, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new - old:+.{digits}f}"))
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table, the first of them its head, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])
