"""The predictions file of an evaluation: written as replies come, scored in worker processes, ordered at the end.

Scoring workers import this module, so nothing here may import torch.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from glm_edge_ft.files import write_text_atomically
from glm_edge_ft.training.metrics import MAX_SCORED_CHARACTERS, PairScores, score_pair, summarize
from glm_edge_ft.training.termination import leave_signals_to_parent

if TYPE_CHECKING:
    from glm_edge_ft.training.replies import GenerationContext, Prompt

CHARACTERS_WORTH_A_POOL = 400_000
"""Characters of all texts together below which one process is done before workers have started: each of them spends
over a second on loading jieba's dictionary and nltk, and a process scores some 200,000 characters a second."""

Pairs = Sequence[tuple[str, str]]


def score_batch(pairs: Pairs) -> list[PairScores]:
    """Score (prediction, reference) pairs in this process."""
    return [score_pair(prediction, reference) for prediction, reference in pairs]


class PairScorer:
    """Scores batches of pairs in worker processes; in this process where there is little to score.

    The workers are spawned, not forked: torch's threads may hold locks that a fork would copy in their locked state.
    Where no workers start, or one of them dies, this process scores the pairs and says so once.

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

    def __exit__(self, *_: object) -> None:
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
        """Return the scores in `future`; where its worker died, score the pairs here."""
        try:
            return future.result()
        except Exception as error:  # a bug in the scoring itself is raised again by the line below
            self._give_up_pool(error)
            return score_batch(pairs)

    def _give_up_pool(self, error: Exception) -> None:
        if self._pool is not None:
            self._warn(f"scoring goes on in one process, which is slower: worker processes failed ({error!r})")
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


class PredictionsWriter:
    """Scores replies and writes a line for each as they come; `finish` puts the lines in order."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], context: GenerationContext) -> None:
        self.path, self.prompts, self.context = path, prompts, context
        self.replies: dict[int, str] = {}
        self.scores: dict[int, PairScores] = {}
        self.waiting: list[tuple[list[int], Pairs, Future[list[PairScores]]]] = []

    def __enter__(self) -> PredictionsWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8")
        expected_characters = 2 * sum(len(prompt.reference) for prompt in self.prompts)
        self.scorer = PairScorer(self.context.scoring_processes, expected_characters, self.context.warn)
        return self

    def __exit__(self, *_: object) -> None:
        self.scorer.__exit__()
        self.file.close()

    def add(self, texts: Mapping[int, str]) -> None:
        """Hand replies, by the number of their prompt, to the scorer; write those whose scores are ready."""
        if not texts:
            return
        self.replies |= texts
        pairs = [(text, self.prompts[index].reference) for index, text in texts.items()]
        self.waiting.append((list(texts), pairs, self.scorer.submit(pairs)))
        while self.waiting and self.waiting[0][-1].done():
            self._write_scored(*self.waiting.pop(0))

    def finish(self) -> dict[str, float]:
        """Wait for all scores, put the file into the data's order and return the means."""
        while self.waiting:
            self._write_scored(*self.waiting.pop(0))
        self.file.close()
        write_text_atomically(self.path, "".join(self._line(index) for index in sorted(self.scores)))
        if cut := sum(scores.was_cut for scores in self.scores.values()):
            limit = f"{MAX_SCORED_CHARACTERS:,} characters"
            self.context.warn(
                f"ROUGE and BLEU see {limit} of each side, and {cut} of {len(self.scores)} pairs are longer"
            )
        return summarize([self.scores[index] for index in sorted(self.scores)])

    def _write_scored(self, indices: list[int], pairs: Pairs, future: Future[list[PairScores]]) -> None:
        for index, scores in zip(indices, self.scorer.result(future, pairs), strict=True):
            self.scores[index] = scores
            self.file.write(self._line(index))
        self.file.flush()

    def _line(self, index: int) -> str:
        prompt = self.prompts[index]
        record = {
            "file": str(prompt.file),
            "line": prompt.line,
            "turn": prompt.turn,
            **({"images": list(prompt.images)} if prompt.images else {}),
            "prompt": self.context.decode(prompt.prompt_ids),
            "reference": prompt.reference,
            "prediction": self.replies[index],
            **self.scores[index].as_dict(),
        }
        return json.dumps(record, ensure_ascii=False) + "\n"
