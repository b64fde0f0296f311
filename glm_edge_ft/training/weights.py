"""Weights that PEFT and `load_state_dict` do not handle: of PREFIX_TUNING's encoder, and whole ones under ZeRO-3.

PEFT saves the prefix that the prompt encoder computes, from which no training with `prefix_projection` can resume. A
checkpoint holds the encoder's own weights beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixEncoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glm_edge_ft.distributed import is_main_process
from glm_edge_ft.errors import RunStopped
from glm_edge_ft.training.checkpoints import ENCODER_FILE


@contextmanager
def prefix_from_state_dict(model: Any, state_dict: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Let PEFT, while it saves, compute the prefix from gathered weights.

    PEFT runs the prompt encoder on the rank that saves. Under ZeRO-3 its forward pass gathers the encoder's weights
    from all ranks, which do not take part, so the run would hang.

    Args:
        model: the model, perhaps wrapped by PEFT.
        state_dict: whole weights by name; None means that the model itself is whole.
    """
    if not state_dict or not _is_prefix_model(model):
        yield
        return
    encoder = _build_encoder(model, state_dict)

    def compute(adapter_name: str) -> torch.Tensor:
        with torch.no_grad():
            return encoder(torch.arange(model.active_peft_config.num_virtual_tokens))

    model.get_prompt_embedding_to_save = compute
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save


def _build_encoder(model: Any, state_dict: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Build the prompt encoder outside DeepSpeed, with the gathered weights."""
    prefix = f"prompt_encoder.{model.active_adapter}."
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    encoder = PrefixEncoder(model.active_peft_config)
    encoder.load_state_dict(weights, assign=True)
    return encoder


def _is_prefix_model(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def has_projection(model: Any) -> bool:
    """Return whether a model is trained by PREFIX_TUNING with `prefix_projection`."""
    return _is_prefix_model(model) and bool(model.active_peft_config.prefix_projection)


def save_encoder(model: Any, state_dict: Mapping[str, torch.Tensor] | None, folder: Path) -> None:
    """Write the prompt encoder's own weights into a checkpoint; arguments as of `prefix_from_state_dict`."""
    encoder = _build_encoder(model, state_dict) if state_dict else model.prompt_encoder[model.active_adapter]
    weights = {name: values.detach().cpu().contiguous() for name, values in encoder.state_dict().items()}
    save_file(weights, folder / ENCODER_FILE)


def load_encoder(model: Any, folder: Path) -> None:
    """Load the weights that `save_encoder` wrote."""
    model.prompt_encoder[model.active_adapter].load_state_dict(load_file(folder / ENCODER_FILE))


def load_sharded_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load `model*.safetensors` of `folder` into a model that ZeRO-3 shards, one tensor at a time.

    `load_state_dict` would find empty placeholders in place of the other processes' shards. Raises RunStopped when a
    weight of the model is missing from the files.
    """
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight is saved under one of its names
    loaded: set[int] = set()
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in sorted(parameters.keys() & stored.keys()):  # the order is the same on all ranks
                parameter = parameters[name]
                with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
                    if is_main_process():
                        parameter.copy_(stored.get_tensor(name))
                loaded.add(id(parameter))
    missing = [name for name, parameter in parameters.items() if id(parameter) not in loaded]
    if missing:
        raise RunStopped(f"{folder} lacks {len(missing)} weights of the model, the first of them {missing[0]}")
