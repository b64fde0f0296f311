"""Scoring beside generation: batches of pairs go to worker processes and come back as futures."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType

from glm_edge_ft.training.metrics import PairScores, score_pair
from glm_edge_ft.training.termination import leave_signals_to_parent

CHARACTERS_WORTH_A_POOL = 400_000
"""Characters of all texts together below which this process is done before workers have started: each of them spends
over a second on loading jieba's dictionary and nltk, one process scores some 200,000 characters a second."""

Pairs = Sequence[tuple[str, str]]


class PairScorer:
    """Scores batches of (prediction, reference) pairs while the caller goes on.

    The workers are started afresh (spawn), not forked: the caller's torch threads may hold locks that a fork would
    copy in their locked state. Work that is too small for that is scored at once, in this process. Where the system
    gives no workers, or one of them dies, this process scores the pairs and says so once.

    Args:
        workers: the most processes to use; 1 or less scores in this process.
        expected_characters: characters of all texts to come, both sides together, as far as they are known.
        warn: shows one line to the user.
    """

    def __init__(self, workers: int, expected_characters: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1 and expected_characters >= CHARACTERS_WORTH_A_POOL:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, spawn, leave_signals_to_parent)

    def __enter__(self) -> PairScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, pairs: Pairs) -> Future[list[PairScores]]:
        """Return a future of the scores of `pairs`, in their order."""
        if self._pool is not None:
            try:
                return self._pool.submit(score_batch, pairs)
            except Exception as error:  # the pool is broken, or the system gives no process
                self._give_up_pool(error)
        done: Future[list[PairScores]] = Future()
        done.set_result(score_batch(pairs))
        return done

    def result(self, future: Future[list[PairScores]], pairs: Pairs) -> list[PairScores]:
        """Return what `future` holds; where its worker died, score the pairs here."""
        try:
            return future.result()
        except Exception as error:  # a mistake in the scoring itself is raised again by the line below
            self._give_up_pool(error)
            return score_batch(pairs)

    def _give_up_pool(self, error: Exception) -> None:
        if self._pool is not None:
            self._warn(f"scoring goes on in one process, which is slower: worker processes failed ({error!r})")
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def score_batch(pairs: Pairs) -> list[PairScores]:
    """Score each pair in this process."""
    return [score_pair(prediction, reference) for prediction, reference in pairs]
