"""The prefix of PREFIX_TUNING as it is saved under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def prompt_from_weights(model: Any, state_dict: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """While PEFT saves, let it take the prefix from gathered weights and not from a forward pass of its encoder.

    PEFT saves what the prompt encoder computes, on the rank that saves alone. Under ZeRO-3 each rank holds a share of
    the encoder, whose forward pass gathers it from all ranks: they are elsewhere, and the run would wait for ever.

    Args:
        model: the model, perhaps wrapped by PEFT.
        state_dict: whole weights by name; None means that the model itself is whole.
    """
    config = getattr(model, "active_peft_config", None)
    if not state_dict or config is None or not config.is_prompt_learning:
        yield
        return
    encoder = _whole_encoder(model, state_dict)

    def compute(adapter_name: str) -> torch.Tensor:
        tokens = torch.arange(config.num_virtual_tokens)
        with torch.no_grad():
            return encoder(tokens)

    model.get_prompt_embedding_to_save = compute
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save


def _whole_encoder(model: Any, state_dict: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Build the prompt encoder outside DeepSpeed, with the gathered weights."""
    from peft import PrefixEncoder

    prefix = f"prompt_encoder.{model.active_adapter}."
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    encoder = PrefixEncoder(model.active_peft_config)
    encoder.load_state_dict(weights, assign=True)
    return encoder
