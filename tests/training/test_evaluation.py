"""Evaluation by generation: every prompt once whatever the ranks, and predictions on disk as they come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_edge_ft.data.collator import PaddedCollator, PromptCollator
from glm_edge_ft.training.evaluation import ReplyTools, generate_and_score, plan_batches


@dataclass(frozen=True)
class Sample:
    """A prompt of given length whose reply should be its number."""

    prompt_ids: list[int]
    reference: str
    line: int
    file: str = "dev.jsonl"
    turn: int = 1
    images: tuple[str, ...] = ()


SAMPLES = [Sample([10 + number] * length, str(number), number + 1) for number, length in enumerate((3, 30, 90, 5, 7))]


def echo(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return as new tokens the last token of each prompt, whose text is the prompt's number."""
    return input_ids[:, -1:]


def tools(generate: Any, said: list[str]) -> ReplyTools:
    """Return tools whose model is a function."""
    collator = PaddedCollator(0, "left")
    return ReplyTools(
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
        model=torch.nn.Identity(),
        prompts=SAMPLES,
        tools=tools(generate, []),
        batch_size=batch_size,
        predictions_file=path,
        process_index=0,
        world_size=1,
        device=torch.device("cpu"),
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a predictions file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
