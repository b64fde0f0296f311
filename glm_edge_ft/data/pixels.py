"""Pixels on their way from the loader's workers: as bytes, which the process that computes normalizes.

These are a quarter of what `images.preprocess` returns, and become the same float32 values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from glm_edge_ft.data.images import preprocess


def can_emit_uint8(image_processor: Any) -> bool:
    """Return whether a processor fits an image into one square tile and scales each value by itself after that.

    Then `resize_into`, and a table of what each value becomes, give what `preprocess` gives. The released one is such.
    """
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    if type(image_processor) is not MllamaImageProcessorPil:
        return False
    size = image_processor.size
    return bool(image_processor.max_image_tiles == 1 and size["height"] == size["width"])


def resize_into(canvas: NDArray[np.uint8], image: Image.Image, image_processor: Any) -> None:
    """Write the values that `preprocess` scales into `canvas`, (side, side, 3) of 0.

    The image is of mode RGB, the processor one that `can_emit_uint8`.
    """
    from transformers.models.mllama.image_processing_pil_mllama import get_image_size_fit_to_canvas

    side = len(canvas)
    height, width = get_image_size_fit_to_canvas(image.height, image.width, side, side, side)
    resized = image if image.size == (width, height) else image.resize((width, height), image_processor.resample)
    canvas[:height, :width] = np.asarray(resized)


@dataclass(frozen=True)
class PixelNormalizer:
    """Makes of bytes the very float32 values that the image processor makes of them."""

    table: torch.Tensor  # (3 * 256,) float32, what each byte becomes, by channel, on the device that computes
    offsets: torch.Tensor  # (3, 1, 1) int32, where the values of each channel begin in it

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return bytes (images, height, width, 3) as (images, 3, height, width) float32, on the table's device.

        Pixels that are scaled already stay as they are.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        indices = pixels.to(self.table.device).permute(0, 3, 1, 2).int() + self.offsets
        return self.table.index_select(0, indices.flatten()).view(indices.shape)

    def add_image_features(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of `VisionCollator` with `pixel_values`, where it has some, as float32."""
        pixels = batch.get("pixel_values")
        return dict(batch) if pixels is None else {**batch, "pixel_values": self(pixels)}

    def remove(self) -> None:
        """Nothing is stored on disk."""


def pixel_normalizer(image_processor: Any, device: torch.device) -> PixelNormalizer | None:
    """Return what normalizes the bytes of a collator; None where the processor does it in a way of its own."""
    if image_processor is None or not can_emit_uint8(image_processor):
        return None
    side = int(image_processor.size["height"])
    shades = np.resize(np.arange(256, dtype=np.uint8), (side, side))
    pixels = preprocess(
        Image.fromarray(np.stack([shades] * 3, axis=-1)), image_processor
    )  # the processor is asked once
    table = torch.from_numpy(pixels.reshape(3, -1)[:, :256].copy()).flatten().to(device)
    offsets = torch.arange(3, dtype=torch.int32, device=device).view(3, 1, 1) * 256
    return PixelNormalizer(table, offsets)
