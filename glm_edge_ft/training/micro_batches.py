"""A batch in parts that bound how many tokens go through the model at once.

A part has rows of similar length, and is cut to its longest row. The gradients of the parts add up to those of the
batch, since the loss of each is divided by the supervised tokens of the whole step; only the draws of dropout differ.
So peak memory does not grow with the batch size, and less padding is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

IMAGE_KEYS = ("pixel_values", "image_features")
CountImages = Callable[[torch.Tensor, int], Sequence[int]]
NO_TOKEN = -1


def plan_parts(lengths: Sequence[int], limit: int, padded: bool = True) -> list[list[int]]:
    """Return the rows of each part, longest rows first; a row that is longer than the limit is a part of its own.

    Args:
        lengths: tokens of each row, without padding.
        limit: most tokens of a part.
        padded: whether each row takes as many tokens as the longest of its part.
    """
    parts: list[list[int]] = []
    taken = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tokens = lengths[parts[-1][0]] if parts and padded else lengths[row]
        if not parts or taken + tokens > limit:
            parts.append([])
            taken, tokens = 0, lengths[row]
        parts[-1].append(row)
        taken += tokens
    return parts


def split_batch(inputs: Mapping[str, Any], limit: int, count_images: CountImages | None = None) -> list[dict[str, Any]]:
    """Return the batch in parts of at most `limit` tokens; a batch within the limit is returned whole.

    Args:
        inputs: `input_ids`, `attention_mask` and `labels`, each `(batch, length)`, padded on the right; or a packed
            batch, see `data.collator.PackedCollator`. With images one of `IMAGE_KEYS`, in the order of their
            placeholders.
        limit: most tokens of a part, padding included.
        count_images: `(input_ids, number of images)` → number of images of each row.
    """
    ids, mask, boundaries = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
    row_lengths = boundaries.diff() if boundaries is not None else mask.sum(dim=1) if mask is not None else None
    if ids.numel() <= limit or row_lengths is None or len(row_lengths) == 1:
        return [dict(inputs)]
    lengths: list[int] = row_lengths.tolist()
    rows_of_ids = ids if boundaries is None else pad_sequence(ids[0].split(lengths), True, NO_TOKEN)
    images, parts = {}, []
    for name in IMAGE_KEYS:
        if inputs.get(name) is not None:
            assert count_images is not None
            images[name] = inputs[name].split(list(count_images(rows_of_ids, len(inputs[name]))))
    for rows in plan_parts(lengths, limit, padded=boundaries is None):
        part = _cut(inputs, rows, lengths) | {
            name: torch.cat([of_rows[row] for row in rows])
            for name, of_rows in images.items()
            if any(len(of_rows[row]) for row in rows)
        }
        parts.append(part)
    return parts


def _cut(inputs: Mapping[str, Any], rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Return these rows without their images, longest first, and what belongs to the whole batch."""
    shape, boundaries = inputs["input_ids"].shape, inputs.get("cu_seq_lens_q")
    longest = lengths[rows[0]]
    if boundaries is None:
        kept: Any = (list(rows), slice(longest))
    else:  # the rows of a packed batch follow one another in its only one
        starts = boundaries.tolist()
        spans = [torch.arange(starts[row], starts[row] + lengths[row]) for row in rows]
        kept = (slice(None), torch.cat(spans).to(boundaries.device))
    part = {
        name: values[kept] if isinstance(values, torch.Tensor) and values.shape == shape else values
        for name, values in inputs.items()
        if name not in IMAGE_KEYS
    }
    if boundaries is not None:
        mine = boundaries.new_tensor([0, *(lengths[row] for row in rows)]).cumsum(0, dtype=boundaries.dtype)
        part |= {"cu_seq_lens_q": mine, "cu_seq_lens_k": mine, "max_length_q": longest, "max_length_k": longest}
    return part
