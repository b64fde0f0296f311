"""The predictions file of an evaluation: written as replies come, scored in worker processes, ordered at the end.

Scoring workers import this module, so nothing here may import torch.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
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


class PredictionsWriter:
    """Scores replies and writes a line for each as they come; `finish` puts the lines in order.

    Where there is enough to score, worker processes do so. They are spawned, not forked: torch's threads may hold locks
    that a fork would copy in their locked state. Where none starts, or one dies, this process goes on and says so once.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], context: GenerationContext) -> None:
        self.path, self.prompts, self.context = path, prompts, context
        self.replies: dict[int, str] = {}
        self.scores: dict[int, PairScores] = {}
        self.waiting: list[tuple[Mapping[int, str], Future[list[PairScores]]]] = []
        self.pool: ProcessPoolExecutor | None = None
        expected_characters = 2 * sum(len(prompt.reference) for prompt in prompts)
        if context.scoring_processes > 1 and expected_characters >= CHARACTERS_WORTH_A_POOL:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(context.scoring_processes, spawn, leave_signals_to_parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")

    def __enter__(self) -> PredictionsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.file.close()

    def add(self, texts: Mapping[int, str]) -> None:
        """Take replies by the number of their prompt; write those whose scores are ready."""
        if texts:
            self.waiting.append((texts, self._submit(texts)))
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
            self.context.warn(f"{cut} of {len(self.scores)} pairs are longer than the {limit} that ROUGE and BLEU see")
        return summarize([self.scores[index] for index in sorted(self.scores)])

    def _pairs(self, texts: Mapping[int, str]) -> Pairs:
        return [(text, self.prompts[index].reference) for index, text in texts.items()]

    def _submit(self, texts: Mapping[int, str]) -> Future[list[PairScores]]:
        if self.pool is not None:
            try:
                return self.pool.submit(score_batch, self._pairs(texts))
            except Exception as error:  # the pool is broken, or the system gives no process
                self._give_up_pool(error)
        done: Future[list[PairScores]] = Future()
        done.set_result(score_batch(self._pairs(texts)))
        return done

    def _write_scored(self, texts: Mapping[int, str], future: Future[list[PairScores]]) -> None:
        try:
            found = future.result()
        except Exception as error:  # a worker died; a bug in the scoring is raised again below
            self._give_up_pool(error)
            found = score_batch(self._pairs(texts))
        self.replies |= texts
        for index, scores in zip(texts, found, strict=True):
            self.scores[index] = scores
            self.file.write(self._line(index))
        self.file.flush()

    def _give_up_pool(self, error: Exception) -> None:
        if self.pool is not None:
            self.context.warn(f"scoring goes on in one process, which is slower: worker processes failed ({error!r})")
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None

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
