"""Replies of rows that join and leave a batch: those that greedy generation gives row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import GenerationConfig, StoppingCriteria

from glm_edge_ft.model.adapters import apply_adapter, generate
from glm_edge_ft.model.decoding import ROOM, start_continuous_batch
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from tests.model.vision_fixtures import SMALL_VOCABULARY, image_row, pad_left, random_images, write_checkpoint
from tests.model_folders import tiny_model

STOPS = list(range(0, 300, 18))
LONGEST = ROOM + 10  # further than a cache grows at once
Chunk = tuple[list[int], torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def config(**changes: Any) -> GenerationConfig:
    """Return greedy settings under which random weights give replies of many lengths."""
    settings = {"do_sample": False, "max_new_tokens": LONGEST, "eos_token_id": STOPS, "pad_token_id": 0}
    return GenerationConfig(**{**settings, **changes})


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Return prompts of 1 to 40 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 41, (count,), generator=generator).tolist()
    return [torch.randint(8, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def chunks(rows: list[list[int]], size: int) -> Iterator[Chunk]:
    """Yield the rows by their numbers, `size` at a time, padded on the left."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in part])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in part])
        yield list(range(start, start + len(part))), ids, mask, {}


def refilled(model: Any, parts: list[Chunk], most: int, **changes: Any) -> dict[int, list[int]]:
    """Generate with at most about `most` rows at once; return the new ids by number."""
    rows = start_continuous_batch(model, {"generation_config": config(**changes)})
    assert rows is not None
    found: dict[int, list[int]] = {}
    for numbers, ids, mask, images in parts:
        while len(rows) >= most:
            found |= rows.step()
        found |= rows.add(numbers, ids, mask, **images)
    while len(rows):
        found |= rows.step()
    return found


def alone(model: Any, ids: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor) -> list[int]:
    """Generate for one row with `generate`; return the new ids."""
    unpadded = slice(int((mask[0] == 0).sum()), None)
    new = generate(model, ids[:, unpadded], mask[:, unpadded], generation_config=config(), **images)
    return [int(token) for token in new[0]]


def adapted(kind: str) -> Any:
    """Return a model in float64, in which no two logits tie, with weights so large that replies hardly repeat."""
    model: Any = tiny_model().double().eval()
    for number, weight in enumerate(model.model.layers.parameters()):
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.6, generator=torch.Generator().manual_seed(number))
    if kind == "LORA":
        return apply_adapter(model, {"peft_type": "LORA", "r": 4, "init_lora_weights": False}).double().eval()
    if kind == "PREFIX_TUNING":
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).double().eval()
        torch.manual_seed(3)
        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=2.0)
    return model


@pytest.mark.parametrize("kind", ["full", "LORA", "PREFIX_TUNING"])
@pytest.mark.parametrize(("size", "most"), [(1, 4), (3, 7)])
def test_replies_are_those_of_each_row_by_itself(kind: str, size: int, most: int) -> None:
    """E1: whoever joins and leaves meanwhile; the prefix is seen, too."""
    model = adapted(kind)
    rows = prompts(14, model.config.vocab_size)
    found = refilled(model, list(chunks(rows, size)), most)
    expected = {number: alone(model, ids, mask) for number, ids, mask, _ in _one_by_one(rows)}
    assert found == expected
    lengths = {len(reply) for reply in expected.values()}
    assert len(lengths) >= 5 and max(lengths) > 30, lengths  # or nothing was tested


def _one_by_one(rows: list[list[int]]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    for numbers, ids, mask, images in chunks(rows, 1):
        yield numbers[0], ids, mask, images


def test_rows_with_images_join_rows_without(tmp_path: Path) -> None:
    """I2: each sees its own picture, and those under way keep theirs."""
    shape = SMALL_VOCABULARY
    model = load_glm_edge_v(write_checkpoint(tmp_path / "model", shape), torch.float32).double().eval()
    texts = [image_row(shape, 5, 6, 7), [shape.user, 20, 21], image_row(shape, 9), image_row(shape, 11, 12)]
    pictures = [{"pixel_values": random_images(1, seed=seed).double()} if seed != 1 else {} for seed in range(4)]
    alone_ids = [
        generate(model, *pad_left(shape, text), generation_config=config(max_new_tokens=12), **picture)[0].tolist()
        for text, picture in zip(texts, pictures, strict=True)
    ]
    parts: list[Chunk] = [([0], *pad_left(shape, texts[0]), pictures[0]), ([1], *pad_left(shape, texts[1]), {})]
    both = {"pixel_values": torch.cat([picture["pixel_values"] for picture in pictures[2:]])}
    parts.append(([2, 3], *pad_left(shape, *texts[2:]), both))
    assert refilled(model, parts, 8, max_new_tokens=12) == dict(enumerate(alone_ids))
    others = {"pixel_values": both["pixel_values"].flip(0)}
    assert refilled(model, [*parts[:2], (*parts[2][:3], others)], 8, max_new_tokens=12) != dict(enumerate(alone_ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 2},
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"min_new_tokens": 3},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"max_new_tokens": None},
    ],
)
def test_what_looks_at_more_than_the_largest_logit_is_left_to_generate(changes: dict[str, Any]) -> None:
    """E1: beams, sampling and penalties."""
    assert start_continuous_batch(tiny_model(), {"generation_config": config(**changes)}) is None


def test_other_options_are_left_to_generate() -> None:
    """Such as a streamer: nothing is passed over in silence."""
    assert start_continuous_batch(tiny_model(), {"generation_config": config(), "streamer": None}) is None
    assert start_continuous_batch(tiny_model(), {"generation_config": config()}) is not None


class AfterThree(StoppingCriteria):
    """Ends all rows at the third token that is made."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return for each row whether it ends."""
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 3)


def test_rows_end_where_they_are_when_the_run_is_to_end() -> None:
    """R5: SIGTERM in an evaluation does not wait for long replies."""
    model = adapted("full")
    options = {"generation_config": config(eos_token_id=None), "stopping_criteria": [AfterThree()]}
    rows = start_continuous_batch(model, options)
    assert rows is not None
    ((numbers, ids, mask, _),) = chunks(prompts(3, model.config.vocab_size), 3)
    assert (rows.add(numbers, ids, mask), rows.step()) == ({}, {})
    assert {number: len(reply) for number, reply in rows.step().items()} == {0: 3, 1: 3, 2: 3}
    assert len(rows) == 0
