"""The run's log: metrics.jsonl without doubled steps, and the table of before and after."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from glm_edge_ft.training.curves import iter_metrics
from glm_edge_ft.training.logs import RunLog, cut_back, format_comparison, peak_memory
from tests.runs import files_of_at_most


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path: Path) -> None:
    """R1: killed at step 7, resumed from 4; a torn last line goes too."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0} for step in range(1, 8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "lo', encoding="utf-8")
    cut_back(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 2, 3, 4]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    """Step 0 keeps nothing, not even an evaluation before the first step."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval_loss": 1.0}\n', encoding="utf-8")
    cut_back(path, 0)
    assert path.read_text(encoding="utf-8") == ""
    cut_back(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_the_table_compares_the_first_evaluation_with_the_one_that_was_kept() -> None:
    """Written out: columns aligned, signs shown, training lines passed over."""
    history = [
        {"step": 0, "eval_loss": 4.5, "eval_rouge-l": 5.25, "eval_bleu-4": 1.0},
        {"step": 10, "loss": 3.0},
        {"step": 20, "eval_loss": 2.25, "eval_rouge-l": 40.5, "eval_bleu-4": 0.5},
    ]
    assert format_comparison(history, history[-1]).splitlines() == [
        "metric   before (step 0)  after (step 20)   change",
        "-------  ---------------  ---------------  -------",
        "loss              4.5000           2.2500  -2.2500",
        "rouge-l             5.25            40.50   +35.25",
        "bleu-4              1.00             0.50    -0.50",
    ]


def test_there_is_no_table_without_two_evaluations() -> None:
    """One evaluation alone shows no change."""
    only = {"step": 6, "eval_loss": 1.0}
    assert format_comparison([only], only) == ""
    assert format_comparison([], None) == ""


def test_the_log_line_tells_where_the_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step, loss, learning rate, gradient norm, tokens per second and the time left; the file has the memory too."""
    log = RunLog(tmp_path, "title", warn=print)
    arguments = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, report_to="none")
    state, control = TrainerState(max_steps=100), TrainerControl()
    log.on_train_begin(arguments, state, control)
    state.global_step = 10
    logs = {"loss": 2.5, "learning_rate": 1e-4, "grad_norm": 0.75, "tokens_per_second": 12345.6}
    log.on_log(arguments, state, control, logs)
    written = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))
    assert isinstance(written.pop("peak_memory_bytes"), int)
    assert written == {"step": 10, **logs}
    line = r"step  10/100  loss 2\.5000  lr 1\.00e-04  grad 0\.75  12,346 tokens/s  left [\d:]+:\d\d\n"
    assert re.fullmatch(line, capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the peak is the GPU's")
def test_the_peak_of_memory_stays_after_what_made_it_is_gone() -> None:
    """300 MB held for a moment, in bytes."""
    before = psutil.Process().memory_info().rss
    held = b"x" * 300_000_000
    length = len(held)
    del held
    peak = peak_memory()
    assert peak is not None
    assert peak > 0.95 * (before + length)


@pytest.mark.fault(by_default=True)
def test_a_log_that_cannot_be_written_is_kept_for_later(tmp_path: Path) -> None:
    """Half a line is never left behind, the order stays, and both ends are said once."""
    said: list[str] = []
    log = RunLog(tmp_path, "title", warn=said.append)
    arguments = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, report_to="none")
    state, control = TrainerState(max_steps=100), TrainerControl()
    file = tmp_path / "metrics.jsonl"

    def log_step(step: int) -> None:
        state.global_step = step
        with contextlib.redirect_stdout(io.StringIO()):  # what pytest captures goes to a file, which is limited too
            log.on_log(arguments, state, control, {"eval_loss": float(step)})

    log_step(1)
    with files_of_at_most(file.stat().st_size + 10):
        log_step(2)
        log_step(3)
    assert [line["step"] for line in iter_metrics(file)] == [1]
    assert file.read_bytes().endswith(b"}\n")
    log_step(4)
    assert [line["step"] for line in iter_metrics(file)] == [1, 2, 3, 4]
    assert said == [
        f"{file} cannot be written (File too large): its lines are kept for later",
        f"{file}: 2 lines that had to wait are written now",
    ]


@pytest.mark.fault(by_default=True)
def test_cutting_the_log_back_leaves_it_whole_where_the_disk_is_full(tmp_path: Path) -> None:
    """R3: a run that is continued drops later lines; on a full disk it keeps what is there."""
    file = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9))
    file.write_text(text, encoding="utf-8")
    with files_of_at_most(20), pytest.raises(OSError, match="File too large"):
        cut_back(file, 4)
    assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell it apart")
def test_the_peak_of_memory_is_that_of_this_process_alone() -> None:
    """Not of the program that started it, whose peak getrusage(2) hands on: here it holds a gigabyte."""
    held = b"x" * 10**9
    code = "from glm_edge_ft.training.logs import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = peak_memory()
    assert peak is not None
    assert 10**7 < int(done.stdout) < len(held) < peak
