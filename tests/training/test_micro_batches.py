"""A batch in parts: which rows go together, what each part holds, and that its gradients add up to the batch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_edge_ft.data.collator import PackedCollator
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from glm_edge_ft.model.packed_attention import PACKED, Attention, use_attention
from glm_edge_ft.training.loss import install_supervised_loss
from glm_edge_ft.training.micro_batches import plan_parts, split_batch
from tests.closeness import assert_same_gradients
from tests.model.vision_fixtures import SMALL_VOCABULARY, image_row, random_images, write_checkpoint


@pytest.mark.parametrize(
    ("lengths", "limit", "parts"),
    [
        ([3, 9, 5, 9], 20, [[1, 3], [2, 0]]),
        ([3, 9, 5, 9], 36, [[1, 3, 2, 0]]),
        ([30, 4, 4, 4], 12, [[0], [1, 2, 3]]),
        ([5], 1, [[0]]),
        ([2, 2, 2], 4, [[0, 1], [2]]),
    ],
)
def test_rows_of_similar_length_go_together(lengths: list[int], limit: int, parts: list[list[int]]) -> None:
    """Longest first; as many as stay within the limit, padding counted; a row that is longer alone."""
    assert plan_parts(lengths, limit) == parts


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_every_row_is_in_one_part_and_no_part_is_too_large(lengths: list[int], limit: int) -> None:
    """For all lengths and limits."""
    parts = plan_parts(lengths, limit)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[row] for row in part) <= limit for part in parts)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_without_padding_a_part_has_as_many_tokens_as_its_rows(lengths: list[int], limit: int) -> None:
    """For all lengths and limits; no part could have taken the first row of the next."""
    parts = plan_parts(lengths, limit, padded=False)
    sizes = [sum(lengths[row] for row in part) for part in parts]
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or size <= limit for part, size in zip(parts, sizes, strict=True))
    following = [lengths[part[0]] for part in parts[1:]]
    assert all(size + tokens > limit for size, tokens in zip(sizes, following, strict=False))


def batch_of(*rows: list[int], pad: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch padded on the right, all of whose tokens but the first of a row are supervised."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_parts_are_cut_to_their_longest_row() -> None:
    """Token by token."""
    parts = split_batch(batch_of([1, 2], [3, 4, 5, 6], [7, 8, 9], [10]), 8)
    assert [part["input_ids"].tolist() for part in parts] == [[[3, 4, 5, 6], [7, 8, 9, 0]], [[1, 2], [10, 0]]]
    assert [part["attention_mask"].tolist() for part in parts] == [[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1], [1, 0]]]
    assert [part["labels"].tolist() for part in parts] == [[[3, 4, 5, 6], [7, 8, 9, -100]], [[1, 2], [10, -100]]]


def test_a_batch_that_fits_stays_whole() -> None:
    """Nothing is put in another order."""
    batch = batch_of([1, 2], [3, 4, 5])
    (whole,) = split_batch(batch, 6)
    assert {name: values.tolist() for name, values in whole.items()} == {k: v.tolist() for k, v in batch.items()}


def packed_batch_of(*rows: list[int]) -> dict[str, Any]:
    """Return rows one behind another, all of whose tokens are supervised."""
    return PackedCollator()([{"input_ids": row, "labels": row} for row in rows])


def test_parts_of_a_packed_batch_are_packed() -> None:
    """Longest rows first, token by token; each part says where its own rows are."""
    parts = split_batch(packed_batch_of([1, 2], [3, 4, 5, 6], [7, 8, 9], [10]), 7)
    assert [part["input_ids"].tolist() for part in parts] == [[[3, 4, 5, 6, 7, 8, 9]], [[1, 2, 10]]]
    assert [part["labels"].tolist() for part in parts] == [[[-100, 4, 5, 6, -100, 8, 9]], [[-100, 2, -100]]]
    assert [part["position_ids"].tolist() for part in parts] == [[[0, 1, 2, 3, 0, 1, 2]], [[0, 1, 0]]]
    assert [part["cu_seq_lens_q"].tolist() for part in parts] == [[0, 4, 7], [0, 2, 3]]
    assert [part["cu_seq_lens_k"].dtype for part in parts] == [torch.int32, torch.int32]
    assert [(part["max_length_q"], part["max_length_k"]) for part in parts] == [(4, 4), (2, 2)]


def test_a_packed_row_that_is_longer_than_the_limit_stays_whole() -> None:
    """There is nothing to cut it at."""
    (whole,) = split_batch(packed_batch_of([1, 2, 3, 4]), 2)
    assert whole["input_ids"].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("key", ["pixel_values", "image_features"])
def test_gradients_of_the_parts_add_up_to_those_of_the_batch(tmp_path: Path, key: str, packed: bool) -> None:
    """Image rows, one with two images, and a text row: each image goes with its row; same loss and gradients."""
    shape = SMALL_VOCABULARY
    two = [*image_row(shape, 8, 9), shape.user, 10, *image_row(shape, 11)[1:]]
    rows = (image_row(shape, 5, 6, 7), [shape.user, 20, 21, shape.assistant, 22], two)
    batch: dict[str, Any] = packed_batch_of(*rows) if packed else batch_of(*rows)
    model: Any = load_glm_edge_v(write_checkpoint(tmp_path, shape), torch.float32).train()
    install_supervised_loss(model)
    if packed:
        use_attention(model, Attention(PACKED, ""))
    with torch.no_grad():
        batch[key] = random_images(3) if key == "pixel_values" else model.model.vision(random_images(3))
    parts = split_batch(batch, 700, model.get_decoder().count_images)
    assert [len(part.get(key, [])) for part in parts] == ([2, 1] if packed else [2, 1, 0])
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    found = []
    for group in ([batch], parts):
        model.zero_grad()
        losses = [model(**part, num_items_in_batch=supervised).loss for part in group]
        for loss in losses:
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((sum(loss.item() for loss in losses), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_same_gradients(found[1][1], found[0][1])
