"""The curve of a run: `metrics.jsonl` read back, losses and learning rate drawn as a PNG."""

from __future__ import annotations

import itertools
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_COLOR = "#1f6fb2"
EVAL_COLOR = "#d9480f"
RATE_COLOR = "#4a5560"
POINTS_WITH_MARKERS = 40
"""Up to so many points each bears a marker; a lone point would not show otherwise, and many of them hide the line."""

MAXIMUM_POINTS = 1500
"""Points of one curve; more of them than the screen has pixels show nothing."""
MAXIMUM_WARNINGS = 20
LARGEST_NUMBER = 1e300  # axes have margins, and no float is larger than 1.8e308

_log = logging.getLogger(__name__)

Points = tuple[list[float], list[float]]


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the log lines of a run in the order of the file; none where the file does not exist yet.

    A last line that is torn (the run was stopped while writing it) is left out; a broken line before it, which a torn
    one becomes when the run goes on, is left out with a warning.

    Args:
        path: a `metrics.jsonl`: one JSON object a line, such as `{"step": 10, "loss": 2.1, "learning_rate": 0.0001}`.
    """
    if not path.exists():
        return
    warnings_left = MAXIMUM_WARNINGS
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                log_line = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):  # bytes that are no UTF-8, and numbers of thousands of digits, too
                log_line = None
            if isinstance(log_line, dict):
                yield from [log_line] if log_line else []
            elif line.endswith(b"\n") and warnings_left:
                warnings_left -= 1
                _log.warning("%s:%d: not a JSON object, left out: %.60r", path, number, line)


def is_number(value: Any) -> bool:
    """Return whether a value of a log line is a number that can be drawn: no NaN, no infinity, no 400 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def read_points(log_lines: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, Points]:
    """Return the points of each key that has any: steps, ascending, and the numbers at them.

    Where a step comes twice (a resumed run repeats steps), the later line counts. Of more than `MAXIMUM_POINTS` points
    the first, the last, and the lowest and the highest of each stretch stay, so that one spike of a long run is seen.
    A line needs 16 bytes of memory a key.
    """
    columns = {key: (array("d"), array("d")) for key in keys}
    for line in log_lines:
        if not is_number(line.get("step")):
            continue
        for key, value in line.items():
            if key in columns and is_number(value):
                columns[key][0].append(line["step"])
                columns[key][1].append(value)
    return {key: _thinned(steps, values) for key, (steps, values) in columns.items() if steps}


def _thinned(steps: array[float], values: array[float]) -> Points:
    order = sorted(range(len(steps)), key=steps.__getitem__)
    last = [index for index, after in itertools.pairwise(order) if steps[index] != steps[after]] + order[-1:]
    if len(last) > MAXIMUM_POINTS:
        stretches = MAXIMUM_POINTS // 2 - 1
        kept = {0, len(last) - 1}
        for number in range(stretches):
            stretch = range(len(last) * number // stretches, len(last) * (number + 1) // stretches)
            kept |= {choose(stretch, key=lambda index: values[last[index]]) for choose in (min, max)}
        last = [last[index] for index in sorted(kept)]
    return [steps[index] for index in last], [values[index] for index in last]


def write_loss_curve(log_lines: Iterable[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw train loss and eval loss over the steps, the learning rate below them, and write the picture.

    Args:
        log_lines: the lines of `metrics.jsonl`. `loss`, `eval_loss` and `learning_rate` are drawn over `step`, as
            `read_points` has them.
        path: the PNG to write. It appears whole or not at all; its folder is made where it is missing.
        title: the heading, in ASCII (the built-in font has no Chinese characters; others are shown as `?`).

    Nothing is written where there is neither a loss nor a learning rate to draw.
    """
    keys = ("loss", "eval_loss", "learning_rate")
    points = read_points(log_lines, keys)
    if not points:
        return
    train_loss, eval_loss, learning_rate = (points.get(key, ([], [])) for key in keys)
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

    with atomic_path(path) as staged:
        figure.savefig(staged, format="png")


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
