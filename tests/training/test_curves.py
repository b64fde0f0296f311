"""The picture of a run and the log file behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from glm_edge_ft.training.curves import EVAL_COLOR, TRAIN_COLOR, iter_metrics, write_loss_curve

REPOSITORY = Path(__file__).parents[2]

TRAIN_LINES = [
    {"step": float(step), "loss": 3 / step, "learning_rate": 1e-4 / step, "epoch": 0.1} for step in range(1, 9)
]
EVAL_LINES = [{"step": 4.0, "eval_loss": 1.5, "eval_rouge-l": 30.0}, {"step": 8.0, "eval_loss": 1.2}]


def pixels_of(path: Path, color: str) -> int:
    """Return how many pixels left of the legend have exactly this colour (`#rrggbb`)."""
    wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
    image = (imread(path)[:, :800, :3] * 255).round().astype(int)
    return int((image == wanted).all(axis=2).sum())


def test_both_losses_are_drawn(tmp_path: Path) -> None:
    """Train and eval loss are there in their colours, in a picture large enough to read."""
    path = tmp_path / "loss.png"
    write_loss_curve([*TRAIN_LINES, *EVAL_LINES], path, "demo")
    assert imread(path).shape[:2] == (720, 1080)
    assert pixels_of(path, TRAIN_COLOR) > 500
    assert pixels_of(path, EVAL_COLOR) > 500


def test_without_evaluation_only_the_train_loss_is_drawn(tmp_path: Path) -> None:
    """C3: a run without a val file has no eval lines."""
    path = tmp_path / "loss.png"
    write_loss_curve(TRAIN_LINES, path, "demo")
    assert pixels_of(path, TRAIN_COLOR) > 500
    assert pixels_of(path, EVAL_COLOR) == 0


def test_a_single_line_is_a_visible_point(tmp_path: Path) -> None:
    """One point makes no line: its marker must show."""
    path = tmp_path / "loss.png"
    write_loss_curve([{"step": 1, "loss": 2.0}], path, "demo")
    assert pixels_of(path, TRAIN_COLOR) > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_passed_over(tmp_path: Path, value: float) -> None:
    """M4: a loss that is not finite changes nothing in the curve of the others, and is not drawn as 0."""
    with_it, without = tmp_path / "with.png", tmp_path / "without.png"
    write_loss_curve([*TRAIN_LINES, {"step": 9, "loss": value, "eval_loss": value}], with_it, "demo")
    write_loss_curve(TRAIN_LINES, without, "demo")
    assert with_it.read_bytes() == without.read_bytes()


def test_a_step_logged_again_after_a_resume_is_drawn_once(tmp_path: Path) -> None:
    """R1: the run went on from an earlier checkpoint; the later lines count and the curve does not run backwards."""
    resumed, straight = tmp_path / "resumed.png", tmp_path / "straight.png"
    lost = [{"step": float(step), "loss": 9.0, "learning_rate": 1e-3} for step in (5, 6)]
    write_loss_curve([*TRAIN_LINES[:4], *lost, *TRAIN_LINES[4:]], resumed, "demo")
    write_loss_curve(TRAIN_LINES, straight, "demo")
    assert resumed.read_bytes() == straight.read_bytes()


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
        "write_loss_curve([{'step': 1, 'loss': 2.0}], Path('loss.png'), 'demo'); "
        "sys.exit('pyplot was imported' if 'matplotlib.pyplot' in sys.modules else 0)"
    )
    program = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
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
