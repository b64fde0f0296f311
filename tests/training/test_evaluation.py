"""Evaluation by generation: every prompt once whatever the ranks, and predictions on disk as they come."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_edge_ft.data.collator import PaddedCollator, PromptCollator
from glm_edge_ft.training.evaluation import RankWorkload, generate_and_score, generate_replies
from glm_edge_ft.training.replies import GenerationContext
from glm_edge_ft.training.sampling import plan_batches


@dataclass(frozen=True)
class Sample:
    """A prompt of given length whose reply should be its number."""

    prompt_ids: list[int]
    reference: str
    line: int
    file: str = "dev.jsonl"
    turn: int = 1
    images: tuple[str, ...] = ()


CPU = torch.device("cpu")
SAMPLES = [Sample([10 + number] * length, str(number), number + 1) for number, length in enumerate((3, 30, 90, 5, 7))]


def echo(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return as new tokens the last token of each prompt, whose text is the prompt's number."""
    return input_ids[:, -1:]


def make_context(generate: Any, said: list[str]) -> GenerationContext:
    """Return a context whose model is a function."""
    collator = PaddedCollator(0, "left")
    return GenerationContext(
        generate=generate,
        collate=PromptCollator(collator),
        clean=lambda ids: str(ids[0] - 10),
        decode=lambda ids: f"{len(ids)} tokens",
        warn=said.append,
        show_progress=False,
    )


def evaluate(path: Path, generate: Any = echo, batch_size: int = 2) -> dict[str, float]:
    """Evaluate the samples in one process."""
    return generate_and_score(
        torch.nn.Identity(), RankWorkload(SAMPLES, batch_size, CPU), make_context(generate, []), path
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a predictions file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class CountedRows:
    """Rows whose replies are as long as their prompt's number says; notes how much is under way."""

    max_new_tokens = 6

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.lengths: dict[int, int] = {}
        self.seen: list[tuple[int, int]] = []  # rows under way, tokens of the longest prompt among them

    def __len__(self) -> int:
        return len(self.left)

    def add(
        self, numbers: Sequence[int], input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: torch.Tensor
    ) -> dict[int, list[int]]:
        """Take up prompts, each with its first token."""
        for number, length in zip(numbers, attention_mask.sum(dim=1).tolist(), strict=True):
            self.left[number], self.lengths[number] = 1 + number % self.max_new_tokens, length
        self.seen.append((len(self.left), max(self.lengths[number] for number in self.left)))
        return self._advance(numbers)

    def step(self) -> dict[int, list[int]]:
        """Add a token to each."""
        return self._advance(list(self.left))

    def _advance(self, numbers: Sequence[int]) -> dict[int, list[int]]:
        for number in numbers:
            self.left[number] -= 1
        done = [number for number in numbers if self.left[number] == 0]
        for number in done:
            del self.left[number]
        return {number: [number] for number in done}


def hand_out(rows: CountedRows, model: Any, options: Any) -> CountedRows:
    """Be the `start_continuous_batch` of a context."""
    return rows


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 3))
def test_rows_that_are_refilled_answer_each_prompt_once_in_the_room_of_a_batch(
    lengths: list[int], size: int, world: int
) -> None:
    """No more rows than `batch_size`, or no more tokens than that takes with the longest prompt; at most 4 times it."""
    prompts = [Sample([1] * length, "", number + 1) for number, length in enumerate(lengths)]
    answered: list[int] = []
    joins = set()
    for rank in range(world):
        rows = CountedRows()
        asked: list[None] = []
        share = RankWorkload(prompts, size, CPU, rank, world, functools.partial(asked.append, None))
        refilling = replace(make_context(echo, []), start_continuous_batch=functools.partial(hand_out, rows))
        for replies in generate_replies(torch.nn.Identity(), refilling, share):
            assert all(ids == [number] for number, ids in replies.items())
            answered += replies
        room = size * (max(lengths) + rows.max_new_tokens)
        for count, longest in rows.seen:
            assert count <= 4 * size
            assert count <= size or count * (longest + rows.max_new_tokens) <= room
        joins.add(len(asked))
    assert sorted(answered) == list(range(len(lengths)))
    assert len(joins) == 1  # what is asked before a batch joins may be a question to all ranks


def test_short_prompts_go_in_more_at_once_than_the_batch_size() -> None:
    """One long prompt sets the room: of the short ones four times the batch size are under way."""
    rows = CountedRows()
    prompts = [Sample([1] * length, "", number + 1) for number, length in enumerate([200] + [5] * 40)]
    share = RankWorkload(prompts, 4, CPU)
    refilling = replace(make_context(echo, []), start_continuous_batch=functools.partial(hand_out, rows))
    assert sum(len(replies) for replies in generate_replies(torch.nn.Identity(), refilling, share)) == 41
    assert max(count for count, _ in rows.seen) > 8


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 7), st.integers(1, 5))
def test_every_index_is_planned_once_and_all_ranks_take_as_many_steps(
    lengths: list[int], size: int, world: int
) -> None:
    """Surplus batches, which keep the ranks in step, are not counted."""
    plans = [plan_batches(lengths, size, rank, world) for rank in range(world)]
    assert len({len(batches) for batches, _ in plans}) == 1
    counted = [index for batches, count in plans for batch in batches[:count] for index in batch]
    assert sorted(counted) == list(range(len(lengths)))
    assert all(len(batch) <= size for batches, _ in plans for batch in batches)


def test_the_longest_batch_comes_first() -> None:
    """So that a lack of memory shows at once."""
    assert plan_batches([3, 30, 90, 5, 7], 2, 0, 1) == ([[2, 1], [4, 3], [0]], 3)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_predictions_stand_in_the_order_of_the_data(tmp_path: Path, batch_size: int) -> None:
    """E4: though they are generated longest first."""
    path = tmp_path / "predictions" / "eval-6.jsonl"
    scores = evaluate(path, batch_size=batch_size)
    assert [(line["line"], line["prediction"], line["reference"]) for line in read(path)] == [
        (number + 1, str(number), str(number)) for number in range(5)
    ]
    assert [line["prompt"] for line in read(path)] == [f"{length} tokens" for length in (3, 30, 90, 5, 7)]
    assert scores["exact-match"] == 100.0
    assert [path.name for path in path.parent.iterdir()] == ["eval-6.jsonl"]


def test_a_killed_evaluation_leaves_what_it_had(tmp_path: Path) -> None:
    """E4: each prediction is written as it comes."""
    calls: list[int] = []

    def breaks_down(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        calls.append(len(input_ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return input_ids[:, -1:]

    path = tmp_path / "eval-6.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(path, breaks_down)
    assert [line["line"] for line in read(path)] == [3, 2, 5, 4]
