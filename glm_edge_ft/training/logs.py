"""What a run tells while it goes on: a line each log step, `metrics.jsonl`, and the curve in `loss.png`."""

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

_DIGITS = {"loss": 4}  # the other metrics have 2


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl` and `loss.png` on rank 0 and shows progress there.

    A resumed run keeps the lines up to its checkpoint and drops later ones, so that each step is in the file once. A
    log that cannot be written, because the disk is full, does not end a run: its lines are written with a later one.

    Args:
        output_dir: the run's folder.
        title: heading of the curve.
        warn: shows one line to the user.
    """

    def __init__(self, output_dir: Path, title: str, warn: Callable[[str], None]) -> None:
        self.metrics_file = output_dir / METRICS_FILE
        self.curve_file = output_dir / CURVE_FILE
        self.title = title
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
        if not args.disable_tqdm:
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
        if line:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _write(self, line: str) -> None:
        """Append a line to `metrics.jsonl`, and those before it that could not be written when they came."""
        waited = len(self.waiting)
        self.waiting.append(line)
        try:
            append_text(self.metrics_file, "".join(self.waiting))
        except OSError as error:
            if not waited:
                self.warn(f"{self.metrics_file} cannot be written ({error.strerror}): its lines are kept for later")
            return
        self.waiting.clear()
        if waited:
            self.warn(f"{self.metrics_file}: {waited} lines that had to wait are written now")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the curve, unless drawing would take more than a twentieth of the run: a long log takes seconds."""
        began = time.monotonic()
        if began >= self.next_drawing:
            self._draw(state)
            self.next_drawing = began + 20 * (time.monotonic() - began)

    on_save = on_evaluate

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar and draw the whole curve."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self._draw(state)
        if self.waiting:
            self.warn(f"{self.metrics_file}: {len(self.waiting)} lines could not be written")

    def _draw(self, state: TrainerState) -> None:
        if not state.is_world_process_zero or not self.metrics_file.is_file():
            return
        try:
            write_loss_curve(iter_metrics(self.metrics_file), self.curve_file, self.title)
        except Exception as error:  # a full disk, a lack of memory, a broken matplotlib: no reason to end a run
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
                return "  ".join([head, f"[{prefix}]", *(" ".join(shown) for shown in _shown_metrics(logs, prefix))])
        return ""

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self.start_step
        if done <= 0:
            return "?"
        return tqdm.format_interval((time.monotonic() - self.start_time) / done * (state.max_steps - state.global_step))


def _shown_metrics(event: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    found = {name: event[f"{prefix}_{name}"] for name in ("loss", *METRIC_NAMES) if f"{prefix}_{name}" in event}
    return [(name, f"{value:.{_DIGITS.get(name, 2)}f}") for name, value in found.items()]


def peak_memory() -> int | None:
    """Return the most bytes this process has held, of its GPU if it uses one, else of the machine; None: unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage(2) would begin at the memory of the program that started this one
        (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def finite_or_none(value: Any) -> Any:
    """Return None for NaN and infinities: neither is JSON, and neither may look like a number that was measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_back(metrics_file: Path, step: int) -> None:
    """Drop the lines of steps after `step`; a start from step 0 begins an empty file."""

    def is_kept(line: Mapping[str, Any]) -> bool:
        return step > 0 and (line["step"] <= step if is_number(line.get("step")) else True)

    _keep_lines(metrics_file, is_kept)


def forget_evaluations(metrics_file: Path, step: int) -> None:
    """Drop the evaluations at `step`, which are about to be done again, so that each is in the file once."""
    _keep_lines(metrics_file, lambda line: line.get("step") != step or not {"eval_loss", "test_loss"} & line.keys())


def _keep_lines(metrics_file: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    if metrics_file.is_file():
        kept = [json.dumps(line) + "\n" for line in iter_metrics(metrics_file) if is_kept(line)]
        write_text_atomically(metrics_file, "".join(kept))


def format_comparison(log_history: Sequence[Mapping[str, Any]], after: Mapping[str, Any] | None) -> str:
    """Return a table of the dev metrics of the first evaluation against those of `after`, or "" without two of them.

    Args:
        log_history: the Trainer's log events, each with its `step`.
        after: the evaluation of the model that was kept.
    """
    before = next((event for event in log_history if "eval_loss" in event), None)
    if before is None or after is None or before["step"] == after["step"]:
        return ""
    rows = [("metric", f"before (step {before['step']})", f"after (step {after['step']})", "change")]
    shown_after = dict(_shown_metrics(after, "eval"))
    for name, shown in _shown_metrics(before, "eval"):
        if name in shown_after:
            change = after[f"eval_{name}"] - before[f"eval_{name}"]
            rows.append((name, shown, shown_after[name], f"{change:+.{_DIGITS.get(name, 2)}f}"))
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table with the first one as its head; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    return "\n".join(lines)
