"""Scoring beside generation: the same scores from any number of processes, in order, whatever happens to a worker."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

from glm_edge_ft.training.metrics import PairScores, score_pair
from glm_edge_ft.training.predictions import CHARACTERS_WORTH_A_POOL, PairScorer

REPLY = "这款连衣裙采用优质棉料，穿着舒适。简约的版型很显瘦！你会喜欢吗？"
REFERENCE = "这件裙子采用柔软的棉料，舒适透气。版型简约，非常显瘦。"


class EndsItsWorker(str):
    """A text like any other here, that ends the process which unpickles it, as the system does when memory is short."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return (os._exit, (1,))


def score_in_batches(
    batches: list[list[tuple[str, str]]], expected_characters: int
) -> tuple[list[PairScores], list[str]]:
    """Score all batches with two workers; return the scores in order and what was said to the user."""
    said: list[str] = []
    with PairScorer(2, expected_characters, said.append) as scorer:
        futures = [scorer.submit(batch) for batch in batches]
        results = [scorer.result(future, batch) for future, batch in zip(futures, batches, strict=True)]
    return [scores for result in results for scores in result], said


def test_workers_return_the_scores_of_one_process_in_order() -> None:
    """Two worker processes, several batches, empty texts among them."""
    batches = [
        [(REPLY[: number % 30], REFERENCE[number % 7 :]) for number in range(start, start + 8)]
        for start in range(0, 40, 8)
    ]
    expected = [score_pair(*pair) for batch in batches for pair in batch]
    assert score_in_batches(batches, CHARACTERS_WORTH_A_POOL) == (expected, [])
    assert multiprocessing.active_children() == []


def test_little_text_is_scored_without_workers() -> None:
    """A worker takes longer to start than a small dev set to score."""
    assert score_in_batches([[(REPLY, REFERENCE)], []], 100) == ([score_pair(REPLY, REFERENCE)], [])


def test_scores_come_even_when_a_worker_dies() -> None:
    """The pool breaks: this process scores the pairs of every batch, and says so once."""
    batches: list[list[tuple[str, str]]] = [
        [(REPLY, REFERENCE), ("", REFERENCE)],
        [(EndsItsWorker(REPLY), REFERENCE)],
        [(REPLY, "")],
    ]
    scores, said = score_in_batches(batches, CHARACTERS_WORTH_A_POOL)
    assert scores == [score_pair(*pair) for batch in batches for pair in batch]
    assert len(said) == 1
    assert "scoring goes on in one process" in said[0]
