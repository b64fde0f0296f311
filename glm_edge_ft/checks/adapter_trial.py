"""Is a form of LoRA kept by its saved matrices? It is tried on small layers before any weights are read.

Some forms change the base model's weights as they begin (PiSSA, OLoRA, LoftQ, KaSA), but PEFT saves the matrices alone.
Others cannot be merged, or draw random numbers that a checkpoint does not hold. So each form is put on layers of random
weights, trained by one random step, saved, loaded, resumed and merged; no list of names says which are kept.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_SIDE = 64  # most rows and columns of a small layer, unless the rank needs more
_TOLERANCE = 1e-4  # of the largest output; what a form loses is some percent of it
# These fields choose layers, not what is done to them.
_WHERE = (
    "exclude_modules",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
)
_FAULTS = (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError, NotImplementedError)


def check_is_kept(settings: Mapping[str, Any], wrapped: PeftModel) -> None:
    """Raise UserError for a `peft_config` whose trained model is not the one that is saved, loaded and merged.

    `wrapped` is what `wrap_meta_model` made by it.
    """
    fault = find_fault(wrapped, is_trained=True) if settings["peft_type"] == "LORA" else None
    if fault is not None:
        key, reason = fault
        fix = "write true, gaussian or orthogonal" if key == "init_lora_weights" else "leave it out"
        raise UserError.single(f"peft_config.{key}", f"{settings.get(key)} {reason}", fix)


def check_is_loaded(wrapped: PeftModel, folder: Path) -> None:
    """Raise UserError for the LoRA of `folder`, on its model, where PEFT loads it as another one."""
    fault = find_fault(wrapped, is_trained=False)
    if fault is not None:
        what = f"its {fault[0]} {fault[1]}"
        raise UserError.single(str(folder / "adapter_config.json"), what, "merge it with the tool that trained it")


def find_fault(model: PeftModel, is_trained: bool) -> tuple[str, str] | None:
    """Return the field of the LoRA config that keeps an adapter from being what its files say, and why; else None.

    Args:
        model: wrapped by PEFT; on the meta device is enough. Other kinds of adapters are not tried.
        is_trained: whether the adapter is trained, saved, resumed and merged, or only loaded.
    """
    from peft.tuners.lora import LoraLayer

    config: Any = model.peft_config["default"]
    layers: dict[str, nn.Module] = {}  # small ones of random weights, by the last part of their names
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            base, short = layer.get_base_layer(), name.rpartition(".")[2]
            side = max(_SIDE, 2 * max(layer.r.values()))
            if isinstance(base, nn.Linear):
                sizes = (min(base.in_features, side), min(base.out_features, side))
                layers.setdefault(short, nn.Linear(*sizes, bias=base.bias is not None))
            elif isinstance(base, nn.Embedding):
                layers.setdefault(short, nn.Embedding(min(base.num_embeddings, side), min(base.embedding_dim, side)))
    reason = _fault(config, layers, is_trained) if layers else ""
    if not reason:
        return None
    default: Any = type(config)()
    for name in (field.name for field in dataclasses.fields(config) if field.name not in (*_WHERE, "target_modules")):
        value = getattr(default, name)
        if getattr(config, name) != value and not _fault(config, layers, is_trained, **{name: value}):
            return name, reason
    return "peft_type", reason


def _fault(config: LoraConfig, layers: dict[str, nn.Module], is_trained: bool, **changes: Any) -> str:
    """Return what goes wrong on small layers, or ""."""
    where: dict[str, Any] = dict.fromkeys(_WHERE) | {"target_modules": list(layers), "ensure_weight_tying": False}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed = dataclasses.replace(config, **changes)
        return _try(dataclasses.replace(changed, **where, inference_mode=False), layers, is_trained)


def _try(config: LoraConfig, layers: dict[str, nn.Module], is_trained: bool) -> str:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    def wrap() -> Any:
        return get_peft_model(nn.ModuleDict(copy.deepcopy(layers)), copy.deepcopy(config)).eval()

    def outputs(model: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {name: layer(inputs[name]) for name, layer in model.base_model.model.items()}

    try:
        trained, loaded = wrap(), wrap()
    except _FAULTS:
        return ""  # PEFT refuses the sizes of these layers: it decides on the real ones
    bases = {name: layer.get_base_layer().state_dict() for name, layer in trained.base_model.model.items()}
    if is_trained and any(
        not torch.equal(values, bases[name][key])
        for name, layer in layers.items()
        for key, values in layer.state_dict().items()
    ):
        return "changes the base model's weights as it begins, and the adapter is saved without them"
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        size: Any = layer.in_features if isinstance(layer, nn.Linear) else layer.num_embeddings
        inputs[name] = torch.randn(8, size) if isinstance(layer, nn.Linear) else torch.arange(size)
    expected = outputs(trained)
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(trained, save_embedding_layers=False))
    if not _are_close(expected, outputs(loaded)):
        return "draws random numbers that are not saved: the adapter comes back from its files as another model"
    state = torch.get_rng_state()
    before = outputs(trained.train())
    torch.set_rng_state(state)
    if is_trained and not _are_close(before, outputs(loaded.train())):
        return "draws random numbers that are not saved: a run that is resumed would go on with others"
    if not is_trained:
        return ""
    try:
        trained.eval().merge_and_unload(safe_merge=True)
    except _FAULTS as error:
        return f"cannot be merged into the base model: {error}"
    is_same = _are_close(expected, outputs(trained))
    return "" if is_same else "cannot be merged into the base model: the merged layers compute something else"


def _are_close(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
    return all(
        float((found[name] - output).abs().max()) <= _TOLERANCE * float(output.abs().max())
        for name, output in expected.items()
    )
