"""A batch in parts that bound how many tokens go through the model at once.

The rows of a batch are put side by side with others of their length, and each part is cut to its own longest row. The
gradients of the parts add up to those of the batch, since the loss of each is divided by the supervised tokens of the
whole step; only the draws of dropout differ. So the peak of memory does not follow the batch size, and padding that a
batch of very different rows would need is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

IMAGE_KEYS = ("pixel_values", "image_features")


def plan_parts(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return the rows of each part, longest rows first; a row that is longer than the limit stands alone.

    Args:
        lengths: tokens of each row, without padding.
        limit: most tokens of a part, padding included.
    """
    parts: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not parts or (len(parts[-1]) + 1) * longest > limit:
            parts.append([])
            longest = lengths[row]
        parts[-1].append(row)
    return parts


def split_batch(
    inputs: Mapping[str, Any], limit: int, count_images: Callable[[torch.Tensor, int], Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """Return the batch in parts of at most `limit` tokens; one that fits as it is comes back whole.

    Args:
        inputs: `input_ids`, `attention_mask` and `labels`, each `(batch, length)`, padded on the right; with images one
            of `IMAGE_KEYS`, in the order of their placeholders.
        limit: most tokens of a part, padding included.
        count_images: `(input_ids, number of images)` → number of images of each row.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None or ids.numel() <= limit or len(ids) == 1:
        return [dict(inputs)]
    lengths = mask.sum(dim=1).tolist()
    images = {name: inputs[name] for name in IMAGE_KEYS if inputs.get(name) is not None}
    of_rows: dict[str, Sequence[torch.Tensor]] = {}
    for name, values in images.items():
        assert count_images is not None
        of_rows[name] = values.split(list(count_images(ids, len(values))))
    parts = []
    for rows in plan_parts(lengths, limit):
        longest = lengths[rows[0]]
        part: dict[str, Any] = {}
        for name, values in inputs.items():
            if name in images:
                chosen = torch.cat([of_rows[name][row] for row in rows])
                if len(chosen):
                    part[name] = chosen
            elif isinstance(values, torch.Tensor) and values.shape == ids.shape:
                part[name] = values[rows, :longest]
            else:
                part[name] = values
        parts.append(part)
    return parts
