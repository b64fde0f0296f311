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
from torch.nn.utils.rnn import pad_sequence

IMAGE_KEYS = ("pixel_values", "image_features")
CountImages = Callable[[torch.Tensor, int], Sequence[int]]
NO_TOKEN = -1


def plan_parts(lengths: Sequence[int], limit: int, padded: bool = True) -> list[list[int]]:
    """Return the rows of each part, longest rows first; a row that is longer than the limit stands alone.

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
    """Return the batch in parts of at most `limit` tokens; one that fits as it is comes back whole.

    Args:
        inputs: `input_ids`, `attention_mask` and `labels`, each `(batch, length)`, padded on the right; or a packed
            batch, as `data.collator.PackedCollator` makes it. With images one of `IMAGE_KEYS`, in the order of their
            placeholders.
        limit: most tokens of a part, padding included.
        count_images: `(input_ids, number of images)` → number of images of each row.
    """
    ids, packed = inputs["input_ids"], inputs.get("cu_seq_lens_q") is not None
    lengths = _lengths_of_rows(inputs) if ids.numel() > limit else []
    if len(lengths) <= 1:
        return [dict(inputs)]
    rows_of_ids = pad_sequence(ids[0].split(lengths), True, NO_TOKEN) if packed else ids
    images = _images_of_rows(inputs, rows_of_ids, count_images)
    parts = []
    for rows in plan_parts(lengths, limit, padded=not packed):
        part = (_packed_part if packed else _padded_part)(inputs, rows, lengths)
        for name, of_rows in images.items():
            chosen = torch.cat([of_rows[row] for row in rows])
            if len(chosen):
                part[name] = chosen
        parts.append(part)
    return parts


def _lengths_of_rows(inputs: Mapping[str, Any]) -> list[int]:
    """Return the tokens of each row, without padding; none where the batch does not say."""
    mask, boundaries = inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
    if boundaries is not None:
        return list(boundaries.diff().tolist())
    return [] if mask is None else list(mask.sum(dim=1).tolist())


def _images_of_rows(
    inputs: Mapping[str, Any], ids: torch.Tensor, count_images: CountImages | None
) -> dict[str, Sequence[torch.Tensor]]:
    of_rows: dict[str, Sequence[torch.Tensor]] = {}
    for name in IMAGE_KEYS:
        if inputs.get(name) is not None:
            assert count_images is not None
            of_rows[name] = inputs[name].split(list(count_images(ids, len(inputs[name]))))
    return of_rows


def _padded_part(inputs: Mapping[str, Any], rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Return these rows, cut to the longest of them, and what belongs to the whole batch."""
    shape = inputs["input_ids"].shape
    return {
        name: values[rows, : lengths[rows[0]]] if isinstance(values, torch.Tensor) and values.shape == shape else values
        for name, values in inputs.items()
        if name not in IMAGE_KEYS
    }


def _packed_part(inputs: Mapping[str, Any], rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Return these rows one behind another, where they begin in it, and what belongs to the whole batch."""
    ids, boundaries = inputs["input_ids"], inputs["cu_seq_lens_q"]
    starts = boundaries.tolist()
    tokens = torch.cat([torch.arange(starts[row], starts[row] + lengths[row]) for row in rows]).to(ids.device)
    part = {
        name: values[:, tokens] if isinstance(values, torch.Tensor) and values.shape == ids.shape else values
        for name, values in inputs.items()
        if name not in IMAGE_KEYS
    }
    mine = boundaries.new_tensor([0, *(lengths[row] for row in rows)]).cumsum(0, dtype=boundaries.dtype)
    longest = lengths[rows[0]]
    return part | {"cu_seq_lens_q": mine, "cu_seq_lens_k": mine, "max_length_q": longest, "max_length_k": longest}
