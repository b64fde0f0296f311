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
"""Up to so many points bear markers: a lone point would not show without one, and many markers hide the line."""
MAXIMUM_POINTS = 1500  # of one curve; a screen has no more pixels
MAXIMUM_WARNINGS = 20
LARGEST_NUMBER = 1e300  # axes have margins, and no float is larger than 1.8e308

_log = logging.getLogger(__name__)

Points = tuple[list[float], list[float]]


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a `metrics.jsonl`, such as `{"step": 10, "loss": 2.1}`; none where there is no file yet.

    A torn last line, as a killed run leaves it, is skipped; any other broken line is skipped with a warning.
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
                _log.warning("%s:%d: not a JSON object, skipped: %.60r", path, number, line)


def is_number(value: Any) -> bool:
    """Return whether a logged value can be drawn: no NaN, no infinity, no integer of 400 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def read_points(log_lines: Iterable[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, Points]:
    """Return the points of each key that has any: steps, ascending, and the numbers at them.

    Of lines with the same step, as a resumed run writes them, the last counts. Of more than `MAXIMUM_POINTS` points the
    lowest and highest of each stretch are kept, so that a spike of a long run is seen. Takes 16 bytes a line and key.
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
    """Draw `loss` and `eval_loss` of `metrics.jsonl` over `step`, with `learning_rate` below, into a PNG.

    The file appears whole or not at all, and not without a point to draw. Characters of the title beyond ASCII are
    shown as `?`: the built-in font has no Chinese ones.
    """
    keys = ("loss", "eval_loss", "learning_rate")
    points = read_points(log_lines, keys)
    if not points:
        return
    train_loss, eval_loss, learning_rate = (points.get(key, ([], [])) for key in keys)
    from matplotlib.figure import Figure  # pyplot would keep global figures and choose a window system
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss_axes.set_title(title.encode("ascii", "replace").decode("ascii"), fontsize=14, loc="left", parse_math=False)
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
        top = 1.15 * max(learning_rate[1])
        rate_axes.set_ylim(bottom=0, top=top or 1)  # from 0: the scale of a constant rate would mean nothing
    else:
        rate_axes.set_yticks([])

    with atomic_path(path) as staged:
        figure.savefig(staged, format="png")


def _draw(axes: Axes, points: Points, label: str, color: str, marker: str) -> None:
    steps, values = points
    if steps:
        marker = marker if len(steps) <= POINTS_WITH_MARKERS else ""
        axes.plot(steps, values, color=color, label=label, marker=marker, markersize=5, linewidth=1.8)
    axes.grid(True, color="#d5d9de", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
