"""Samples of different length to one batch: padded, or packed without padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from glm_edge_ft import IGNORE_INDEX
from glm_edge_ft.data.feature_cache import FeatureStore
from glm_edge_ft.data.images import BACKGROUND, fit, fitted_shape, load_image, preprocess
from glm_edge_ft.errors import RunStopped, UserError


@dataclass(frozen=True)
class PaddedCollator:
    """Pads `input_ids` and `labels`, for training on the right, for generation on the left.

    Attributes:
        pad_token_id: fills `input_ids`; the mask, not the id, says what is padding.
        padding_side: "right" for training, "left" where generation continues the rows.
        pad_to_multiple_of: the padded length is rounded up to a multiple of it.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and, where the samples have them, `labels`: (batch, length) int64.

        `labels` are -100 where nothing is supervised and on the padding.
        """
        length = max(len(sample["input_ids"]) for sample in samples)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        shape = (len(samples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        if "labels" in samples[0]:
            batch["labels"] = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for row, sample in enumerate(samples):
            count = len(sample["input_ids"])
            place = slice(0, count) if self.padding_side == "right" else slice(length - count, length)
            batch["attention_mask"][row, place] = 1
            for key in ("input_ids", "labels"):
                if key in batch:
                    batch[key][row, place] = torch.as_tensor(sample[key], dtype=torch.int64)
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Puts rows one behind another into a single one, for training without padding."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch and where its rows are; `model/packed_attention.py` keeps them apart.

        The names are those by which transformers knows padding-free batches.

        Returns:
            `input_ids`, `labels` and `position_ids`, (1, tokens) int64. Positions start at 0 in every row, and the
            first label of a row is -100: the loss shifts by one, and the last token of a row must not predict the next
            row.
            `cu_seq_lens_q` and `cu_seq_lens_k`, (rows + 1,) int32: where rows begin, and the number of tokens.
            `max_length_q` and `max_length_k`: tokens of the longest row.
        """
        lengths = [len(sample["input_ids"]) for sample in samples]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        labels = torch.cat([torch.as_tensor(sample["labels"], dtype=torch.int64) for sample in samples])
        labels[starts[:-1]] = IGNORE_INDEX
        ids = torch.cat([torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples])
        boundaries, longest = starts.to(torch.int32), max(lengths)
        return {
            "input_ids": ids.unsqueeze(0),
            "labels": labels.unsqueeze(0),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(frozen=True)
class VisionCollator:
    """Joins rows as `text` does and adds the pixels of the samples' images, decoded here: in the loader's workers.

    Attributes:
        text: makes a batch of ids and labels.
        image_processor: of the checkpoint (`model.loading.load_image_processor`).
        features: what the vision part made of images before; their pixels are not needed again.
        skip: told of each image that can no longer be read; None: such an image ends the run.
        emit_uint8: whether `pixel_values` are the bytes that `PixelNormalizer` makes float32 of, (images, 672, 672, 3)
            uint8: for processors that `images.scales_bytes`.
        skipped: those that this process met.
    """

    text: PaddedCollator | PackedCollator
    image_processor: Any
    features: FeatureStore | None = None
    skip: Callable[[str], None] | None = None
    emit_uint8: bool = False
    skipped: set[str] = field(default_factory=set, compare=False)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what `text` returns and `pixel_values`, (images, 3, 672, 672) float32.

        The images stand in the order of their placeholders: sample by sample, and in order within one. Without an image
        in the batch there are no `pixel_values`. An image that several samples share is decoded once. One that can no
        longer be read is shown as a blank one where `skip` says so, and its row teaches nothing.

        With `features`, `pixel_values` has the distinct images that have no record yet, or is absent, and two more keys
        say what each image of the batch is, (images,) int64: `image_records`, the number of its record or -1, and
        `image_pixels`, its place in `pixel_values` or -1. `feature_cache.ImageFeatures` makes vectors of them.

        Raises:
            RunStopped: an image can no longer be read.
        """
        shown = [path for sample in samples for path in sample.get("images", ())]
        paths = list(dict.fromkeys(shown))
        numbers = {} if self.features is None else {path: self.features.numbers.get(path, -1) for path in paths}
        needed = [path for path in paths if self.features is None or not self.features.holds(numbers[path])]
        pixels, bad = self._decode(shown if self.features is None else needed)
        batch: dict[str, Any] = self.text(
            [_without_labels(sample) if bad & set(sample.get("images", ())) else sample for sample in samples]
        )
        if pixels is not None:
            batch["pixel_values"] = pixels
        if shown and self.features is not None:
            places = {path: place for place, path in enumerate(needed)}
            records = [-1 if path in bad else numbers[path] for path in shown]  # a blank image is not kept
            batch["image_records"] = torch.tensor(records)
            batch["image_pixels"] = torch.tensor([places.get(path, -1) for path in shown])
        return batch

    def _decode(self, paths: Sequence[str]) -> tuple[torch.Tensor | None, set[str]]:
        """Return the pixels of the images, each decoded once, and which of them are blank instead."""
        if not paths:
            return None, set()
        bad: set[str] = set()
        first_places: dict[str, int] = {}
        images: list[NDArray[np.float32]] = []
        pixels = _shared_zeros(len(paths), fitted_shape(self.image_processor)) if self.emit_uint8 else None
        for place, path in enumerate(paths):
            first = first_places.setdefault(path, place)
            if first < place:
                images += images[first : first + 1]
                if pixels is not None:
                    pixels[place] = pixels[first]
                continue
            image = self._open(path, bad)
            if pixels is not None:
                fit(image, self.image_processor, pixels[place].numpy())
            else:
                images.append(preprocess(image, self.image_processor))
        return torch.from_numpy(np.stack(images)) if pixels is None else pixels, bad

    def _open(self, path: str, bad: set[str]) -> Image.Image:
        """Return the picture, or, where that is wanted, a blank one for one that can no longer be read: a bad one."""
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


def _shared_zeros(count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return (count, *shape) uint8 of 0; in a loader's process in memory that it shares, so that no copy follows."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(count, *shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * math.prod(shape))  # fresh pages, which are 0
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, *shape)


def _without_labels(sample: Mapping[str, Any]) -> dict[str, Any]:
    if "labels" not in sample:
        return dict(sample)
    return {**sample, "labels": np.full_like(sample["labels"], IGNORE_INDEX)}


def open_again(path: str) -> Image.Image:
    """Return the picture of an image that was there before training. Raises RunStopped when it cannot be read now."""
    try:
        return load_image(path)
    except UserError as error:  # a loader's worker can only pass on an exception that is made of one text
        (problem,) = error.problems
        what = f"an image that was there before training cannot be read now: {problem.where}: {problem.what}"
        raise RunStopped(what) from None


@dataclass(frozen=True)
class PromptCollator:
    """Evaluation samples (`prompts.PromptSample`) to a batch that generation can continue.

    Attributes:
        collator: pads on the left.
    """

    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and, where the prompts have images, what `VisionCollator` adds."""
        return self.collator([{"input_ids": prompt.prompt_ids, "images": prompt.images} for prompt in prompts])
