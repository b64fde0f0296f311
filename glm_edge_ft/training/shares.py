"""Whole weights from disk into a model of which, under ZeRO-3, each process holds a share."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from glm_edge_ft.errors import RunStopped


def load_shares(model: torch.nn.Module, folder: Path) -> None:
    """Load `model*.safetensors` of `folder` one tensor at a time; each process keeps its share of it.

    `load_state_dict` would find empty placeholders where the shares of the others are.

    Raises:
        RunStopped: a weight of the model is not there.
    """
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight is saved under one of its names
    read: set[int] = set()
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # no mapping
                if name not in parameters:
                    continue
                parameter = parameters[name]
                with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
                    if torch.distributed.get_rank() == 0:
                        parameter.copy_(stored.get_tensor(name))
                read.add(id(parameter))
    missing = [name for name, parameter in parameters.items() if id(parameter) not in read]
    if missing:
        raise RunStopped(f"{folder} lacks {len(missing)} weights of the model, the first of them {missing[0]}")
