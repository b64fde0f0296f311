"""Images to what the model gets: against plain Pillow, and bytes that are normalized later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from glm_edge_ft.data.images import preprocess
from glm_edge_ft.data.pixels import pixel_normalizer, resize_into
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.checkpoint import ModelLocation
from glm_edge_ft.model.loading import load_image_processor
from tests.data.vision import image_processor_of


def by_recipe(image: Image.Image) -> NDArray[np.float64]:
    """Return the pixels by the released recipe in plain Pillow and numpy, (3, 672, 672)."""
    width, height = image.size
    size = (672, max(1, height * 672 // width)) if width >= height else (max(1, width * 672 // height), 672)
    canvas = np.zeros((672, 672, 3))
    canvas[: size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    return (canvas.transpose(2, 0, 1) / 255 - 0.5) / 0.5


@pytest.mark.parametrize(
    "size", [(672, 672), (100, 37), (37, 100), (1344, 700), (1000, 999), (5, 5), (1, 1), (1, 900), (900, 1), (3, 2)]
)
def test_preprocessing_equals_the_recipe(tmp_path: Path, size: tuple[int, int]) -> None:
    """I3: enlarged and reduced, odd proportions, sides of one pixel: within 1e-6 of plain Pillow."""
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = preprocess(image, image_processor_of(tmp_path))
    assert (pixels.shape, pixels.dtype) == ((3, 672, 672), np.float32)
    assert np.abs(pixels - by_recipe(image)).max() < 1e-6


@pytest.mark.parametrize("size", [(672, 672), (100, 37), (37, 100), (1344, 700), (1, 1), (1, 900), (900, 1)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        {"resample": 2, "do_normalize": False},
        {"size": {"height": 336, "width": 336}, "do_rescale": False},
    ],
    ids=["released", "other mean", "bilinear", "half the side"],
)
def test_bytes_scaled_later_equal_the_processor_bit_by_bit(
    tmp_path: Path, size: tuple[int, int], changes: dict[str, Any]
) -> None:
    """I3: what the loader hands on as bytes becomes the very values that the processor makes, black edges included."""
    noise = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    noise[..., 1] = noise[..., 1] // 2  # channels that differ
    image, processor = Image.fromarray(noise), image_processor_of(tmp_path, **changes)
    scale = pixel_normalizer(processor, torch.device("cpu"))
    assert scale is not None
    canvas = np.zeros((processor.size["height"], processor.size["width"], 3), dtype=np.uint8)
    resize_into(canvas, image, processor)
    pixels = scale(torch.from_numpy(canvas).unsqueeze(0))
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels[0].numpy(), preprocess(image, processor))


@pytest.mark.parametrize("changes", [{"max_image_tiles": 4}, {"image_processor_type": "SiglipImageProcessor"}])
def test_bytes_are_not_handed_on_where_the_processor_does_more(tmp_path: Path, changes: dict[str, Any]) -> None:
    """I4: tiles, and processors of another kind, stay with the processor itself."""
    assert pixel_normalizer(image_processor_of(tmp_path, **changes), torch.device("cpu")) is None


def test_several_tiles_are_refused(tmp_path: Path) -> None:
    """I4: no part of a picture is left out without a word."""
    processor = image_processor_of(tmp_path, max_image_tiles=4)
    with pytest.raises(UserError, match="cuts an image into 4 tiles, the model takes one"):
        preprocess(Image.new("RGB", (1300, 1300)), processor)


def test_a_folder_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    """I4: a chat model's folder, for instance."""
    (tmp_path / "config.json").write_text('{"model_type": "glm"}', encoding="utf-8")
    with pytest.raises(UserError, match="its image processor cannot be used"):
        load_image_processor(ModelLocation(str(tmp_path), str(tmp_path), is_local=True))
