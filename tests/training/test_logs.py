"""The run's log: metrics.jsonl without doubled steps, and the table of before and after."""

from __future__ import annotations

import json
from pathlib import Path

from glm_edge_ft.training.logs import cut_back, format_comparison


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
