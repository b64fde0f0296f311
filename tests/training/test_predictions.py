"""Scoring beside generation: the same scores from any number of processes, in order, whatever happens to a worker."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from glm_edge_ft.training import predictions
from glm_edge_ft.training.metrics import PairScores, score_pair, summarize
from glm_edge_ft.training.predictions import PredictionsWriter
from tests.training.test_evaluation import Sample, echo, make_context

REPLY = "这款连衣裙采用优质棉料，穿着舒适。简约的版型很显瘦！你会喜欢吗？"
REFERENCE = "这件裙子采用柔软的棉料，舒适透气。版型简约，非常显瘦。"


class EndsItsWorker(str):
    """A text like any other here, that ends the process which unpickles it, as the system does when memory is short."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return (os._exit, (1,))


def score_in_batches(path: Path, batches: list[list[tuple[str, str]]]) -> tuple[list[PairScores], list[str]]:
    """Score all batches with two workers; return the scores in order and what was said to the user."""
    said: list[str] = []
    pairs = [pair for batch in batches for pair in batch]
    prompts = [Sample([1], reference, line) for line, (_, reference) in enumerate(pairs)]
    context = replace(make_context(echo, said), scoring_processes=2)
    with PredictionsWriter(path, prompts, context) as writer:
        numbered = iter(enumerate(prediction for prediction, _ in pairs))
        for batch in batches:
            writer.add(dict(itertools.islice(numbered, len(batch))))
        means = writer.finish()
        assert means == summarize([writer.scores[index] for index in range(len(pairs))])
    return [writer.scores[index] for index in range(len(pairs))], said


@pytest.fixture
def many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let little text be worth worker processes."""
    monkeypatch.setattr(predictions, "CHARACTERS_WORTH_A_POOL", 0)


@pytest.mark.usefixtures("many_workers")
def test_workers_return_the_scores_of_one_process_in_order(tmp_path: Path) -> None:
    """Two worker processes, several batches, empty texts among them."""
    batches = [
        [(REPLY[: number % 30], REFERENCE[number % 7 :]) for number in range(start, start + 8)]
        for start in range(0, 40, 8)
    ]
    expected = [score_pair(*pair) for batch in batches for pair in batch]
    assert score_in_batches(tmp_path / "eval-1.jsonl", batches) == (expected, [])
    assert multiprocessing.active_children() == []


def test_little_text_is_scored_without_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker takes longer to start than a small dev set to score."""
    monkeypatch.setattr(predictions, "ProcessPoolExecutor", None)
    assert score_in_batches(tmp_path / "eval-1.jsonl", [[(REPLY, REFERENCE)], []]) == (
        [score_pair(REPLY, REFERENCE)],
        [],
    )


@pytest.mark.usefixtures("many_workers")
def test_scores_come_even_when_a_worker_dies(tmp_path: Path) -> None:
    """The pool breaks: this process scores the pairs of every batch, and says so once."""
    batches: list[list[tuple[str, str]]] = [
        [(REPLY, REFERENCE), ("", REFERENCE)],
        [(EndsItsWorker(REPLY), REFERENCE)],
        [(REPLY, "")],
    ]
    scores, said = score_in_batches(tmp_path / "eval-1.jsonl", batches)
    assert scores == [score_pair(*pair) for batch in batches for pair in batch]
    assert len(said) == 1
    assert "scoring goes on in one process" in said[0]
