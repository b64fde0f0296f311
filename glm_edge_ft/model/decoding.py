"""Greedy replies of many prompts at once, in which a row that is finished makes room for the next prompt.

`generate` computes a batch until its longest reply ends, finished rows included. Here finished rows are taken out of
the cache and new prompts join those that are still being generated (continuous batching); the tokens of each row are
those of greedy generation by itself.

    row 1  . . p p p p r r r r r        a prompt (p) and its reply so far (r), all padded on the left (.)
    row 2  . . . . . . p p p r r        joined two steps ago
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled

ROOM = 64
"""Columns by which a cache grows, so that most steps copy only their own tokens."""
_FINISHED_SHARE = 4  # finished rows are taken out when they are one in so many


class ContinuousBatch:
    """Rows whose replies are being generated.

    Attributes:
        numbers: the caller's number of each row.
        max_new_tokens: the most tokens of a reply.
    """

    def __init__(self, model: Any, config: GenerationConfig, stopping_criteria: Sequence[Any] = ()) -> None:
        """Begin without rows.

        Args:
            model: may carry an adapter.
            config: complete; see `start_continuous_batch`.
            stopping_criteria: end all rows as they are when one of them says so.
        """
        peft_config = _peft_config(model)
        self._has_prefix = peft_config is not None and peft_config.is_prompt_learning
        self._adapted = model
        self._model = model if peft_config is None else model.get_base_model()
        self._criteria = stopping_criteria
        stops = config.eos_token_id if config.eos_token_id is not None else []
        self._stop_ids = frozenset([stops] if isinstance(stops, int) else stops)
        self.max_new_tokens = int(config.max_new_tokens)
        self.numbers: list[int] = []
        self._replies: list[list[int]] = []
        self._is_finished: list[bool] = []
        self._layers: list[_GrowingLayer] = []
        self._mask = torch.empty(0)

    def __len__(self) -> int:
        """Return how many rows are not finished."""
        return len(self._is_finished) - sum(self._is_finished)

    @torch.no_grad()
    def add(
        self, numbers: Sequence[int], input_ids: torch.Tensor, attention_mask: torch.Tensor, **images: torch.Tensor
    ) -> dict[int, list[int]]:
        """Let prompts join, each with its first new token; return what is finished, as `step` does.

        Args:
            numbers: the caller's number of each row.
            input_ids, attention_mask: `(batch, length)`, padded on the left.
            images: of the rows, as the model takes them.
        """
        self._remove_finished()
        count = len(numbers)
        layers = _growing_layers(self._model, self._adapted.get_prompt(count) if self._has_prefix else None)
        prefix = layers[0].get_seq_length()
        mask = torch.cat([attention_mask.new_ones(count, prefix), attention_mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, prefix:]
        new = self._forward(input_ids, mask, positions, layers, images)
        self._join(layers, mask)
        self.numbers += numbers
        self._replies += [[] for _ in numbers]
        self._is_finished += [False] * count
        return self._append(new, first=len(self.numbers) - count)

    @torch.no_grad()
    def step(self) -> dict[int, list[int]]:
        """Add a token to each reply; return the new ids, with the stop token, of each reply that is now finished."""
        self._mask = pad(self._mask, (0, 1), value=1)
        last = torch.tensor([[reply[-1]] for reply in self._replies], device=self._mask.device)
        positions = self._mask.sum(dim=1, keepdim=True) - 1
        return self._append(self._forward(last, self._mask, positions, self._layers, {}), first=0)

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        layers: list[_GrowingLayer],
        images: Mapping[str, torch.Tensor],
    ) -> list[int]:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            cache=Cache(layers=list(layers)),
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        return [int(token) for token in output.logits[:, -1].float().argmax(dim=-1).tolist()]

    def _append(self, new: Sequence[int], first: int) -> dict[int, list[int]]:
        ended = any(bool(criterion(self._mask, None).any()) for criterion in self._criteria)
        done: dict[int, list[int]] = {}
        for row, token in enumerate(new, start=first):
            reply = self._replies[row]
            reply.append(token)
            if not self._is_finished[row] and (ended or token in self._stop_ids or len(reply) >= self.max_new_tokens):
                self._is_finished[row] = True
                done[self.numbers[row]] = list(reply)
        if _FINISHED_SHARE * sum(self._is_finished) >= len(self._is_finished):
            self._remove_finished()
        return done

    def _remove_finished(self) -> None:
        if not any(self._is_finished):
            return
        kept = [row for row, is_finished in enumerate(self._is_finished) if not is_finished]
        self.numbers = [self.numbers[row] for row in kept]
        self._replies = [self._replies[row] for row in kept]
        self._is_finished = [False] * len(kept)
        if not kept:
            self._layers, self._mask = [], torch.empty(0)
            return
        rows = torch.tensor(kept, device=self._mask.device)
        mask = self._mask[rows]
        unused = int(mask.any(dim=0).int().argmax())  # columns in which all rows that are left are padded
        self._mask = mask[:, unused:]
        for layer in self._layers:
            layer.replace(*(states[rows, :, unused:] for states in layer.states()))

    def _join(self, layers: list[_GrowingLayer], mask: torch.Tensor) -> None:
        if not self._layers:
            self._layers, self._mask = layers, mask
            return
        width = max(self._mask.shape[1], mask.shape[1])
        missing = [width - one.shape[1] for one in (self._mask, mask)]
        self._mask = torch.cat([pad(one, (by, 0)) for one, by in zip((self._mask, mask), missing, strict=True)])
        for old, new in zip(self._layers, layers, strict=True):
            joined = []
            for both in zip(old.states(), new.states(), strict=True):
                padded = [pad(states, (0, 0, by, 0)) for states, by in zip(both, missing, strict=True)]
                joined.append(torch.cat(padded))
            old.replace(*joined)


def start_continuous_batch(model: Any, options: Mapping[str, Any]) -> ContinuousBatch | None:
    """Return an empty batch; None where only `generate` does what is asked for.

    That is where a token depends on more than the largest logit (beams, sampling, penalties), where the cache of the
    model is not one of keys and values for all tokens, and where processes have to compute in step (ZeRO-3).

    Args:
        model: may carry an adapter.
        options: of `generate`: `generation_config`, `stopping_criteria`.
    """
    if set(options) - {"generation_config", "stopping_criteria"} or is_deepspeed_zero3_enabled():
        return None
    base = model if _peft_config(model) is None else model.get_base_model()
    config, _ = base._prepare_generation_config(options.get("generation_config"))
    special = (config.stop_strings, config.max_time, config.cache_implementation, config.prompt_lookup_num_tokens)
    if any(value is not None for value in special) or not config.use_cache or config.max_new_tokens is None:
        return None
    if config.get_generation_mode() != GenerationMode.GREEDY_SEARCH or (config.num_return_sequences or 1) > 1:
        return None
    layers = DynamicCache(config=base.config.get_text_config()).layers
    base._prepare_special_tokens(config, True, device=base.device)
    changes = base._get_logits_processor(config, input_ids_seq_length=1, device=str(base.device), model_kwargs={})
    if changes or not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    return ContinuousBatch(model, config, tuple(options.get("stopping_criteria") or ()))


def _peft_config(model: Any) -> Any:
    """Return the config of a model's adapter; None where it has none."""
    return getattr(model, "active_peft_config", None)


class _GrowingLayer(DynamicLayer):
    """A cache layer that grows by `ROOM` columns at once; `keys` and `values` are views of those in use."""

    def __init__(self) -> None:
        super().__init__()
        self._storage: dict[str, torch.Tensor] = {}

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and the values of all tokens, each (batch, heads, tokens, size)."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold other keys and values."""
        self._storage.clear()
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens, (batch, heads, tokens, size); return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.states()
        self.keys = self._append("keys", keys, key_states)
        self.values = self._append("values", values, value_states)
        return self.states()

    def _append(self, name: str, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        used = states.shape[-2] if states.numel() else 0
        width = used + new.shape[-2]
        buffer = self._storage.get(name)
        if buffer is None or width > buffer.shape[-2]:
            batch, heads, _, size = new.shape
            dtype = torch.promote_types(states.dtype, new.dtype)
            buffer = new.new_empty(batch, heads, width + ROOM, size, dtype=dtype)
            if used:
                buffer[:, :, :used] = states
            self._storage[name] = buffer
        buffer[:, :, used:width] = new
        return buffer[:, :, :width]


def _growing_layers(model: Any, prefix: Cache | None) -> list[_GrowingLayer]:
    """Return empty layers for a model, or those that hold the keys and values of a trained prefix."""
    layers = [_GrowingLayer() for _ in DynamicCache(config=model.config.get_text_config()).layers]
    trained: list[Any] = list(prefix.layers) if prefix is not None else []
    for layer, states in zip(layers, trained, strict=prefix is not None):
        layer.update(states.keys, states.values)
    return layers
