"""Samples of different length to one batch: padded, or packed without padding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from glm_edge_ft import IGNORE_INDEX
from glm_edge_ft.data.feature_cache import FeatureStore
from glm_edge_ft.data.images import BACKGROUND, load_image, preprocess
from glm_edge_ft.data.pixels import resize_into
from glm_edge_ft.errors import RunStopped, UserError


@dataclass(frozen=True)
class PaddedCollator:
    """Pads `input_ids` and `labels`: on the right for training, on the left where generation continues the rows."""

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and, where the samples have them, `labels`: (batch, length) int64.

        `labels` are -100 where nothing is supervised and on the padding.
        """
        pad = functools.partial(pad_sequence, batch_first=True, padding_side=self.padding_side)
        ids = _tensors(samples, "input_ids")
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids]),
        }
        if "labels" in samples[0]:
            batch["labels"] = pad(_tensors(samples, "labels"), padding_value=IGNORE_INDEX)
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Puts rows one behind another into a single one, for training without padding."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a padding-free batch, by transformers' names; `model/packed_attention.py` keeps its rows apart.

        Returns:
            `input_ids`, `labels` and `position_ids`, (1, tokens) int64. Positions start at 0 in every row, and the
            first label of a row is -100, since the last token of a row must not predict the next row.
            `cu_seq_lens_q` and `cu_seq_lens_k`, (rows + 1,) int32: where rows begin, and the number of tokens.
            `max_length_q` and `max_length_k`: tokens of the longest row.
        """
        lengths = [len(sample["input_ids"]) for sample in samples]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        labels = torch.cat(_tensors(samples, "labels"))
        labels[starts[:-1]] = IGNORE_INDEX
        boundaries, longest = starts.to(torch.int32), max(lengths)
        return {
            "input_ids": torch.cat(_tensors(samples, "input_ids")).unsqueeze(0),
            "labels": labels.unsqueeze(0),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(frozen=True)
class VisionCollator:
    """Joins rows as `text` does and adds the pixels of the samples' images, decoded here: in the loader's workers."""

    text: PaddedCollator | PackedCollator
    image_processor: Any  # of the checkpoint (`model.loading.load_image_processor`)
    features: FeatureStore | None = None  # features computed before, whose pixels are not needed again
    skip: Callable[[str], None] | None = None  # told of each image that can no longer be read; None: it ends the run
    emit_uint8: bool = False  # bytes (images, 672, 672, 3) for `PixelNormalizer`, if the processor `can_emit_uint8`
    skipped: set[str] = field(default_factory=set, compare=False)  # images that this process could not read

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what `text` returns and `pixel_values`, (images, 3, 672, 672) float32.

        The images stand in the order of their placeholders: sample by sample, and in order within one. Without an image
        in the batch there are no `pixel_values`. An image that several samples share is decoded once. One that can no
        longer be read is shown as a blank one where `skip` says so, and none of its row is learned.

        With `features`, `pixel_values` has the distinct images that have no record yet, or is absent, and two more keys
        say what each image of the batch is, (images,) int64: `image_records`, the number of its record or -1, and
        `image_pixels`, its index in `pixel_values` or -1. `feature_cache.ImageFeatures` makes vectors of them.

        Raises:
            RunStopped: an image can no longer be read.
        """
        shown = [path for sample in samples for path in sample.get("images", ())]
        needed, records = shown, {}
        if self.features is not None:
            records = {path: self.features.numbers.get(path, -1) for path in shown}
            needed = [path for path, record in records.items() if not self.features.holds(record)]
        pixels, bad = self._decode(needed)
        batch: dict[str, Any] = self.text(
            [_without_labels(sample) if bad & set(sample.get("images", ())) else sample for sample in samples]
        )
        if pixels is not None:
            batch["pixel_values"] = pixels
        if shown and self.features is not None:
            indices = {path: index for index, path in enumerate(needed)}
            batch["image_records"] = torch.tensor([-1 if path in bad else records[path] for path in shown])
            batch["image_pixels"] = torch.tensor([indices.get(path, -1) for path in shown])
        return batch

    def _decode(self, paths: Sequence[str]) -> tuple[torch.Tensor | None, set[str]]:
        """Return the pixels of the images, each decoded once, and which of them are blank instead."""
        bad: set[str] = set()
        if not paths:
            return None, bad
        if not self.emit_uint8:
            made = {path: preprocess(self._open(path, bad), self.image_processor) for path in dict.fromkeys(paths)}
            return torch.from_numpy(np.stack([made[path] for path in paths])), bad
        side = int(self.image_processor.size["height"])
        pixels = _shared_zeros(len(paths), (side, side, 3))
        for index, path in enumerate(paths):
            if (first := paths.index(path)) < index:
                pixels[index] = pixels[first]
            else:
                resize_into(pixels[index].numpy(), self._open(path, bad), self.image_processor)
        return pixels, bad

    def _open(self, path: str, bad: set[str]) -> Image.Image:
        """Return the image; with `skip`, a blank one for one that can no longer be read, whose path goes into `bad`."""
        try:
            return open_again(path)
        except RunStopped as error:
            if self.skip is None:
                raise
            if path not in self.skipped:
                self.skipped.add(path)
                count = len(self.skipped)
                self.skip(f"{error}; its rows teach nothing (on_bad_image: skip; {count} such images so far)")
            bad.add(path)
            return Image.new("RGB", (32, 32), BACKGROUND)


def _tensors(samples: Sequence[Mapping[str, Any]], key: str) -> list[torch.Tensor]:
    return [torch.as_tensor(sample[key], dtype=torch.int64) for sample in samples]


def _shared_zeros(count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return (count, *shape) uint8 of 0; in a loader's process in memory that it shares, so that no copy follows."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(count, *shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * math.prod(shape))  # fresh pages, which are 0
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, *shape)


def _without_labels(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: np.full_like(value, IGNORE_INDEX) if key == "labels" else value for key, value in sample.items()}


def open_again(path: str) -> Image.Image:
    """Return an image that was there before training. Raises RunStopped when it cannot be read now."""
    try:
        return load_image(path)
    except UserError as error:  # a loader's worker can only pass on an exception that is made of one text
        (problem,) = error.problems
        what = f"an image that was there before training cannot be read now: {problem.where}: {problem.what}"
        raise RunStopped(what) from None


@dataclass(frozen=True)
class PromptCollator:
    """Makes a batch that generation can continue of evaluation samples (`prompts.PromptSample`)."""

    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]  # pads on the left

    def __call__(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and, where the prompts have images, what `VisionCollator` adds."""
        return self.collator([{"input_ids": prompt.prompt_ids, "images": prompt.images} for prompt in prompts])
