"""The curve of a run: `metrics.jsonl` read back, losses and learning rate drawn as a PNG."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glm_edge_ft.files import unfinished_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_COLOR = "#1f6fb2"
EVAL_COLOR = "#d9480f"
RATE_COLOR = "#4a5560"
POINTS_WITH_MARKERS = 40
"""Up to so many points each bears a marker; a lone point would not show otherwise, and many of them hide the line."""

_log = logging.getLogger(__name__)

Points = tuple[list[float], list[float]]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the log lines of a run.

    Args:
        path: a `metrics.jsonl`: one JSON object a line, such as `{"step": 10, "loss": 2.1, "learning_rate": 0.0001}`.

    Returns:
        The objects in the order of the file; empty where the file does not exist yet. A last line that is torn (the run
        was stopped while writing it) is left out; a broken line before it, which a torn one becomes when the run goes
        on, is left out with a warning.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    log_lines: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            log_line = json.loads(line)
        except ValueError:  # covers bytes that are no UTF-8
            log_line = None
        if isinstance(log_line, dict):
            log_lines.append(log_line)
        elif number < len(lines):
            _log.warning("%s:%d: not a JSON object, left out: %.60r", path, number, line)
    return log_lines


def write_loss_curve(log_lines: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw train loss and eval loss over the steps, the learning rate below them, and write the picture.

    Args:
        log_lines: the lines of `metrics.jsonl`. `loss`, `eval_loss` and `learning_rate` are drawn over `step`, other
            keys are passed over, and so are values that are not finite. Where a step comes twice (a resumed run
            repeats steps), the later line counts.
        path: the PNG to write. It appears whole or not at all; its folder is made where it is missing.
        title: the heading, in ASCII (the built-in font has no Chinese characters; others are shown as `?`).

    Nothing is written where there is neither a loss nor a learning rate to draw.
    """
    train_loss, eval_loss = _points(log_lines, "loss"), _points(log_lines, "eval_loss")
    learning_rate = _points(log_lines, "learning_rate")
    if not (train_loss[0] or eval_loss[0] or learning_rate[0]):
        return
    # The object-oriented interface: pyplot would keep global figures and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    ascii_title = title.encode("ascii", "replace").decode("ascii")
    loss_axes.set_title(ascii_title, fontsize=14, loc="left", parse_math=False)
    _draw(loss_axes, train_loss, "train loss", TRAIN_COLOR, "o")
    _draw(loss_axes, eval_loss, "eval loss", EVAL_COLOR, "s")
    _draw(rate_axes, learning_rate, "learning rate", RATE_COLOR, "o")
    loss_axes.set_ylabel("loss", fontsize=12)
    if train_loss[0] or eval_loss[0]:
        loss_axes.legend(fontsize=11, loc="upper right")
    rate_axes.set_ylabel("learning rate", fontsize=12)
    rate_axes.set_xlabel("step", fontsize=12)
    rate_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if learning_rate[0]:
        rate_axes.set_ylim(
            bottom=0, top=1.15 * max(learning_rate[1]) or 1
        )  # from 0, or a constant rate shows a meaningless scale
    else:
        rate_axes.set_yticks([])

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(path)
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _points(log_lines: Sequence[Mapping[str, float]], key: str) -> Points:
    """Return the steps, ascending, and the finite values of `key` at them."""
    values: dict[float, float] = {}
    for line in log_lines:
        step, value = line.get("step"), line.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value):
            values[step] = value
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _draw(axes: Axes, points: Points, label: str, color: str, marker: str) -> None:
    """Draw one line with a grid behind it, with markers where its points are few."""
    steps, values = points
    if steps:
        marker = marker if len(steps) <= POINTS_WITH_MARKERS else ""
        axes.plot(steps, values, color=color, label=label, marker=marker, markersize=5, linewidth=1.8)
    axes.grid(True, color="#d5d9de", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
