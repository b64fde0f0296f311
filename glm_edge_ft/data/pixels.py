"""From the bytes of images to what the model gets, in the process that computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glm_edge_ft.data.images import scaled_values, scales_bytes


@dataclass(frozen=True)
class PixelNormalizer:
    """Scales bytes to the very float32 values that the image processor makes of them.

    Attributes:
        table: what each byte becomes, by channel, (3 * 256,) float32, on the device that computes.
        offsets: where the values of each channel begin in it, (3, 1, 1) int32.
    """

    table: torch.Tensor
    offsets: torch.Tensor

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return bytes (images, height, width, 3) as (images, 3, height, width) float32, on the table's device.

        Pixels that are scaled already stay as they are.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        places = pixels.to(self.table.device).permute(0, 3, 1, 2).int() + self.offsets
        return self.table.index_select(0, places.flatten()).view(places.shape)

    def add_image_features(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of `VisionCollator` with `pixel_values`, where it has some, as float32."""
        pixels = batch.get("pixel_values")
        return dict(batch) if pixels is None else {**batch, "pixel_values": self(pixels)}

    def remove(self) -> None:
        """Nothing lies anywhere."""


def pixel_normalizer(image_processor: Any, device: torch.device) -> PixelNormalizer | None:
    """Return what scales the bytes that a collator hands on; None where the processor does it in a way of its own."""
    if image_processor is None or not scales_bytes(image_processor):
        return None
    table = torch.from_numpy(scaled_values(image_processor)).flatten().to(device)
    offsets = torch.arange(3, dtype=torch.int32, device=device).view(3, 1, 1) * 256
    return PixelNormalizer(table, offsets)
