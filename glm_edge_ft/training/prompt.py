"""The prefix of PREFIX_TUNING: as it is saved under ZeRO-3, and the projection that it is computed by.

PEFT saves what the prompt encoder computes, from which no training with `prefix_projection` can go on. A checkpoint
holds the encoder's own weights beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from glm_edge_ft.training.checkpoints import ENCODER_FILE


@contextmanager
def prompt_from_weights(model: Any, state_dict: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """While PEFT saves, let it take the prefix from gathered weights and not from a forward pass of its encoder.

    PEFT saves what the prompt encoder computes, on the rank that saves alone. Under ZeRO-3 each rank holds a share of
    the encoder, whose forward pass gathers it from all ranks: they are elsewhere, and the run would wait for ever.

    Args:
        model: the model, perhaps wrapped by PEFT.
        state_dict: whole weights by name; None means that the model itself is whole.
    """
    config = _prefix_config(model)
    if not state_dict or config is None:
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


def has_projection(model: Any) -> bool:
    """Return whether a model is trained under PREFIX_TUNING with `prefix_projection`."""
    config = _prefix_config(model)
    return config is not None and bool(config.prefix_projection)


def save_encoder(model: Any, state_dict: Mapping[str, torch.Tensor] | None, folder: Path) -> None:
    """Write the prompt encoder's own weights into a checkpoint; the arguments are those of `prompt_from_weights`."""
    encoder = _whole_encoder(model, state_dict) if state_dict else model.prompt_encoder[model.active_adapter]
    weights = {name: values.detach().cpu().contiguous() for name, values in encoder.state_dict().items()}
    save_file(weights, folder / ENCODER_FILE)


def load_encoder(model: Any, folder: Path) -> None:
    """Read what `save_encoder` wrote."""
    model.prompt_encoder[model.active_adapter].load_state_dict(load_file(folder / ENCODER_FILE))


def _prefix_config(model: Any) -> Any:
    config = getattr(model, "active_peft_config", None)
    return config if config is not None and config.is_prompt_learning else None
