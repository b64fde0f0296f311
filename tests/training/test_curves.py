"""The curve of a run and the log file behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from glm_edge_ft.training.curves import (
    EVAL_COLOR,
    MAXIMUM_POINTS,
    TRAIN_COLOR,
    iter_metrics,
    read_points,
    write_loss_curve,
)

TRAIN_LINES = [
    {"step": float(step), "loss": 3 / step, "learning_rate": 1e-4 / step, "epoch": 0.1} for step in range(1, 9)
]
EVAL_LINES = [{"step": 4.0, "eval_loss": 1.5, "eval_rouge-l": 30.0}, {"step": 8.0, "eval_loss": 1.2}]


def pixels_of(path: Path, color: str) -> int:
    """Return how many pixels left of the legend have exactly this colour (`#rrggbb`)."""
    wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
    image = (imread(path)[:, :800, :3] * 255).round().astype(int)
    return int((image == wanted).all(axis=2).sum())


@pytest.mark.parametrize(
    ("lines", "train", "evaluation"),
    [
        pytest.param([*TRAIN_LINES, *EVAL_LINES], 500, 500, id="both"),
        pytest.param(TRAIN_LINES, 500, 0, id="C3: without a val file"),
        pytest.param([{"step": 1, "loss": 2.0}], 20, 0, id="one point, by its marker"),
    ],
)
def test_losses_are_drawn_in_their_colors(
    tmp_path: Path, lines: list[dict[str, float]], train: int, evaluation: int
) -> None:
    """Large enough to read, each loss visible where it was logged."""
    path = tmp_path / "loss.png"
    write_loss_curve(lines, path, "demo")
    assert imread(path).shape[:2] == (720, 1080)
    assert pixels_of(path, TRAIN_COLOR) > train
    assert pixels_of(path, EVAL_COLOR) > evaluation if evaluation else pixels_of(path, EVAL_COLOR) == 0


NOT_FINITE = ("nan", "inf", "-inf")
LOST = [{"step": float(step), "loss": 9.0, "learning_rate": 1e-3} for step in (5, 6)]


@pytest.mark.parametrize(
    "lines",
    [
        *(
            [*TRAIN_LINES, {"step": 9, "loss": float(value), "eval_loss": float(value)}]
            for value in ("nan", "inf", "-inf")
        ),
        [*TRAIN_LINES[:4], *LOST, *TRAIN_LINES[4:]],
    ],
)
def test_values_that_do_not_count_change_nothing(tmp_path: Path, lines: list[dict[str, float]]) -> None:
    """M4: a loss that is not finite; R1: steps that a resumed run logged again."""
    write_loss_curve(lines, tmp_path / "with.png", "demo")
    write_loss_curve(TRAIN_LINES, tmp_path / "without.png", "demo")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


@pytest.mark.parametrize(
    "lines", [[], [{"step": 3, "eval_rouge-l": 20.0}], [{"loss": 2.0}], [{"step": 1, "loss": float("nan")}]]
)
def test_nothing_to_draw_writes_no_file(tmp_path: Path, lines: list[dict[str, float]]) -> None:
    """No lines, no losses, no steps, no finite values."""
    write_loss_curve(lines, tmp_path / "loss.png", "demo")
    assert list(tmp_path.iterdir()) == []


def test_an_older_picture_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    """Written under another name, then renamed; the folder is made where it is missing."""
    path = tmp_path / "output" / "loss.png"
    write_loss_curve(TRAIN_LINES[:2], path, "demo")
    first = path.read_bytes()
    write_loss_curve(TRAIN_LINES, path, "demo")
    assert path.read_bytes() != first
    assert list(path.parent.iterdir()) == [path]


def test_a_picture_that_cannot_take_its_place_leaves_no_half_file(tmp_path: Path) -> None:
    """A folder stands where the picture should: the error is raised, the folder stays, no temporary file remains."""
    path = tmp_path / "loss.png"
    path.mkdir()
    with pytest.raises(OSError, match=r"loss\.png"):
        write_loss_curve(TRAIN_LINES, path, "demo")
    assert list(tmp_path.iterdir()) == [path]


def test_titles_with_mathematics_and_chinese_are_plain_text(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A folder name such as `输出_$a_$` raises nothing and warns of no missing glyph."""
    write_loss_curve(TRAIN_LINES, tmp_path / "loss.png", "输出_$a_$ {x}")
    assert (tmp_path / "loss.png").exists()
    assert [str(warning.message) for warning in recwarn] == []


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """No global figure and no window system: pyplot is never imported."""
    program = (
        "import sys; from pathlib import Path; from glm_edge_ft.training.curves import write_loss_curve; "
        "write_loss_curve([{'step': 1, 'loss': 2.0}], Path(sys.argv[1]), 'demo'); "
        "sys.exit('pyplot was imported' if 'matplotlib.pyplot' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "loss.png")], check=True)
    assert (tmp_path / "loss.png").exists()


def test_log_lines_are_read_in_order(tmp_path: Path) -> None:
    """Blank lines are fine; NaN, as Python writes it, is read."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.5}\n\n{"step": 2, "eval_loss": 1.5, "eval_rouge-l": 30.25}\n', encoding="utf-8"
    )
    assert list(iter_metrics(path)) == [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 1.5, "eval_rouge-l": 30.25}]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "note": "\xe4\xbd', b"{", b'"ste'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes) -> None:
    """R1: the run was killed while it wrote a line, within a character too."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + torn)
    assert list(iter_metrics(path)) == [{"step": 1, "loss": 2.5}]
    assert caplog.text == ""


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R1: a torn line that a resumed run wrote on."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "l{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n', encoding="utf-8"
    )
    assert list(iter_metrics(path)) == [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.0}]
    assert f"{path}:2: not a JSON object" in caplog.text


def test_a_log_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    """A run that was stopped before its first log line."""
    assert list(iter_metrics(tmp_path / "metrics.jsonl")) == []


def loss_points(log: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the points of the training loss."""
    return list(zip(*read_points(log, ["loss"])["loss"], strict=True))


def test_a_long_curve_keeps_its_spikes_and_its_ends() -> None:
    """One step of 20,000 whose loss jumped; the last value is what people read off."""
    log = [{"step": step, "loss": 50.0 if step == 12_345 else 1.0 + step % 7} for step in range(20_000)]
    points = loss_points(log)
    assert MAXIMUM_POINTS / 2 < len(points) <= MAXIMUM_POINTS
    assert (12_345, 50.0) in points
    assert (points[0], points[-1]) == ((0, 1.0), (19_999, 1.0 + 19_999 % 7))


def test_values_that_are_no_numbers_are_left_out() -> None:
    """NaN, infinities, null and text; of a step that comes twice the later line counts."""
    values: list[Any] = [float("nan"), float("inf"), None, "3", True]
    log = [{"step": step, "loss": value} for step, value in enumerate(values)]
    assert loss_points([*log, {"step": 9, "loss": 1.0}, {"step": 9, "loss": 2.0}, {"loss": 3.0}]) == [(9, 2.0)]
