"""Batches of the data room in the true model class at small widths: the pixels reach the right rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from glm_edge_ft.data.collator import PaddedCollator, VisionCollator
from glm_edge_ft.data.dataset import EncodedDataset, build_dataset
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig
from tests.data.vision import PLACEHOLDER, REPLY, image_processor_of, text, user, vision_encoder
from tests.model.vision_fixtures import SMALL_VOCABULARY, released_config


@pytest.fixture(scope="module")
def model(backend: Tokenizer) -> GlmEdgeVForCausalLM:
    """A model of the true geometry whose vocabulary is the test tokenizer's."""
    torch.manual_seed(0)
    fields = {**released_config(SMALL_VOCABULARY), "vocab_size": backend.get_vocab_size(), "pad_token_id": 0}
    fields |= {"boi_token_id": backend.token_to_id(PLACEHOLDER), "torch_dtype": "float32", "initializer_range": 0.3}
    return GlmEdgeVForCausalLM(GlmEdgeVConfig(**fields)).eval()


@pytest.fixture
def dataset(backend: Tokenizer, write_rows: Callable[..., Path], tmp_path: Path) -> EncodedDataset:
    """A row with a red image, a row of text, a row with a blue image in its second turn."""
    parts = {}
    for color in ("red", "blue"):
        Image.new("RGB", (30, 20), color).save(tmp_path / f"{color}.png")
        parts[color] = {"type": "image", "image": f"{color}.png"}
    rows = [
        [user(parts["red"], text("hello")), REPLY],
        [user(text("hello")), REPLY],
        [user(text("hello")), REPLY, user(text("there"), parts["blue"]), REPLY],
    ]
    return build_dataset([write_rows(rows)], vision_encoder(backend, count=578), 1, tmp_path / "c", progress=False)[0]


def test_rows_of_a_mixed_batch_are_as_alone(
    model: GlmEdgeVForCausalLM, dataset: EncodedDataset, tmp_path: Path
) -> None:
    """I2: each row's logits in the batch are its logits alone; the text row needs no vision part."""
    collate = VisionCollator(PaddedCollator(0), image_processor_of(tmp_path))
    with torch.no_grad():
        together = model(**collate([dataset[index] for index in range(3)])).logits
        for index in range(3):
            alone = model(**collate([dataset[index]])).logits[0]
            room = 1e-3 * float(alone.abs().max())
            torch.testing.assert_close(together[index, : len(alone)], alone, rtol=0, atol=room)


def test_the_loss_of_a_row_depends_on_its_image(
    model: GlmEdgeVForCausalLM, dataset: EncodedDataset, tmp_path: Path
) -> None:
    """I2: with the images of two rows exchanged, the losses are others; the text row's is the same."""
    collate = VisionCollator(PaddedCollator(0), image_processor_of(tmp_path))
    samples = [dataset[index] for index in range(3)]
    exchanged = [{**samples[index], "images": samples[2 - index]["images"]} for index in range(3)]
    with torch.no_grad():
        before, after = ([model(**collate([row])).loss.item() for row in rows] for rows in (samples, exchanged))
    assert before[1] == after[1]
    assert abs(before[0] - after[0]) > 1e-3
    assert abs(before[2] - after[2]) > 1e-3
