"""What evaluation by generation works on: prompts, rows for the loss, and the functions that generate and decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset


class Prompt(Protocol):
    """A reply to generate: the ids up to the assistant marker, the reference, and where the data file has it."""

    @property
    def prompt_ids(self) -> Any: ...  # a sequence or array of ids
    @property
    def reference(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def turn(self) -> int: ...
    @property
    def images(self) -> Sequence[str]: ...  # paths


@dataclass(frozen=True)
class EvaluationData(Dataset):
    """A data file as rows for the loss and as prompts for generation.

    Attributes:
        rows: encoded rows, each a dict of `input_ids` and `labels`.
        lengths: number of tokens of each row.
        prompts: one for each assistant turn.
    """

    rows: Any
    lengths: Sequence[int]
    prompts: Sequence[Prompt]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class ContinuousDecoder(Protocol):
    """Generates replies in a batch that takes new prompts as replies finish; `add` and `step` return the finished."""

    max_new_tokens: int

    def __len__(self) -> int: ...
    def add(
        self, numbers: Sequence[int], input_ids: torch.Tensor, attention_mask: torch.Tensor, **images: torch.Tensor
    ) -> dict[int, list[int]]: ...
    def step(self) -> dict[int, list[int]]: ...


@dataclass(frozen=True)
class GenerationContext:
    """The functions and settings that generation needs from data and model.

    Attributes:
        generate: `(model, **batch, **options)` → new tokens `(batch, new_length)`.
        collate: prompts → `input_ids` and `attention_mask`, `(batch, length)`, left-padded, and `pixel_values` where
            the prompts have images.
        clean: new token ids → the reply's text, up to its stop token.
        decode: token ids → text with its special tokens, for the predictions file.
        warn: shows one line to the user.
        options: passed to `generate`, among them `generation_config`.
        add_image_features: a batch on the model's device → the model's inputs; `generate` does this itself.
        start_continuous_batch: `(model, options)` → a decoder that replies as `generate` does, or None.
        scoring_processes: worker processes for BLEU and ROUGE.
        loader_processes: processes that call `collate`, worth it for images; 0: this one.
        show_progress: whether to draw a bar.
    """

    generate: Callable[..., torch.Tensor]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    clean: Callable[[Sequence[int]], str]
    decode: Callable[[Sequence[int]], str]
    warn: Callable[[str], None]
    options: Mapping[str, Any] = field(default_factory=dict)
    add_image_features: Callable[[dict[str, torch.Tensor]], dict[str, Any]] = dict
    start_continuous_batch: Callable[[Any, Mapping[str, Any]], ContinuousDecoder | None] = lambda model, options: None
    scoring_processes: int = 1
    loader_processes: int = 0
    show_progress: bool = True


class ImageFeatureSource(Protocol):
    """What adds to a batch what loader processes leave out of images, and may keep it for later batches."""

    def add_image_features(self, batch: Mapping[str, Any]) -> dict[str, Any]: ...
    def remove(self) -> None: ...
