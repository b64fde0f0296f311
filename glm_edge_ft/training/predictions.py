"""The file of an evaluation's predictions: written as replies come, scored beside, put in order at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.files import write_text_atomically
from glm_edge_ft.training.metrics import MAX_SCORED_CHARACTERS, PairScores, summarize
from glm_edge_ft.training.scoring import Pairs, PairScorer

if TYPE_CHECKING:
    from glm_edge_ft.training.replies import GenerationContext, Prompt


class NullWriter:
    """What the ranks other than 0 hold."""

    def __enter__(self) -> NullWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def add(self, texts: Mapping[int, str]) -> None:
        """Leave it to rank 0."""

    def finish(self) -> dict[str, float]:
        """Return no metrics: rank 0 has them."""
        return {}


class PredictionsWriter:
    """Scores replies in worker processes and writes a line for each: as they come, and at the end in order."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], tools: GenerationContext) -> None:
        self.path, self.prompts, self.tools = path, prompts, tools
        self.replies: dict[int, str] = {}
        self.scores: dict[int, PairScores] = {}
        self.waiting: list[tuple[list[int], Pairs, Future[list[PairScores]]]] = []

    def __enter__(self) -> PredictionsWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8")
        expected_characters = 2 * sum(len(prompt.reference) for prompt in self.prompts)
        self.scorer = PairScorer(self.tools.scoring_processes, expected_characters, self.tools.warn)
        self.scorer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.scorer.__exit__(*error)
        self.file.close()

    def add(self, texts: Mapping[int, str]) -> None:
        """Hand replies, by the number of their prompt, to the scorer; write those whose scores are there."""
        if not texts:
            return
        self.replies |= texts
        pairs = [(text, self.prompts[index].reference) for index, text in texts.items()]
        self.waiting.append((list(texts), pairs, self.scorer.submit(pairs)))
        while self.waiting and self.waiting[0][-1].done():
            self._take(*self.waiting.pop(0))

    def finish(self) -> dict[str, float]:
        """Wait for all scores, put the file into the data's order and return the means."""
        while self.waiting:
            self._take(*self.waiting.pop(0))
        self.file.close()
        write_text_atomically(self.path, "".join(self._line(index) for index in sorted(self.scores)))
        cut = sum(scores.was_cut for scores in self.scores.values())
        if cut:
            self.tools.warn(
                f"{cut} of {len(self.scores)} pairs have a side of more than {MAX_SCORED_CHARACTERS:,} characters; "
                "ROUGE and BLEU saw its beginning only"
            )
        return summarize([self.scores[index] for index in sorted(self.scores)])

    def _take(self, indices: list[int], pairs: Pairs, future: Future[list[PairScores]]) -> None:
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
            "prompt": self.tools.decode(prompt.prompt_ids),
            "reference": prompt.reference,
            "prediction": self.replies[index],
            **self.scores[index].as_dict(),
        }
        return json.dumps(record, ensure_ascii=False) + "\n"
