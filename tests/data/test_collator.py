"""Batches, number by number."""

from __future__ import annotations

import numpy as np
import torch

from glm_edge_ft.data.collator import PackedCollator, PaddedCollator

SAMPLES = [
    {"input_ids": np.array([5, 6, 7]), "labels": np.array([-100, 6, 7])},
    {"input_ids": np.array([8]), "labels": np.array([8])},
]


def test_padding_on_the_right() -> None:
    """E2: ids, mask and labels; padding bears no loss, whatever id fills it."""
    batch = PaddedCollator(pad_token_id=8)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 8, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padding_on_the_left_for_generation() -> None:
    """E2: all prompts end in the last column."""
    prompts = [{"input_ids": sample["input_ids"].astype(np.int32)} for sample in SAMPLES]
    batch = PaddedCollator(pad_token_id=0, padding_side="left")(prompts)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert "labels" not in batch


def test_rows_one_behind_another() -> None:
    """T3: positions start anew, and no row's last token is asked for the next row's first."""
    batch = PackedCollator()([*SAMPLES, {"input_ids": np.array([1, 2]), "labels": np.array([1, 2])}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch.keys().isdisjoint({"attention_mask"})
    assert SAMPLES[1]["labels"].tolist() == [8]
