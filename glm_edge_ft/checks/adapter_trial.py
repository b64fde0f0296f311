"""Whether a form of LoRA is kept by its saved matrices, tried on small layers before any weights are read.

Some forms change the base model's weights as they begin (PiSSA, OLoRA, LoftQ, KaSA). PEFT saves the matrices alone; who
loads them must change the weights again, which fails where it takes random numbers, rounds otherwise, or is left out.
Others cannot be merged, or draw random numbers of which a checkpoint knows nothing. No list of names says which do:
each form is put on layers of random weights, trained by one random step, saved, loaded, resumed and merged.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from peft import LoraConfig, PeftModel

Use = Literal["load", "merge", "train"]
_SIDE = 64  # most rows and columns of a small layer, unless the rank needs more
_TOLERANCE = 1e-4  # of the largest output; what a form loses is some percent of it
# What chooses layers, not what is done to them.
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
    """Refuse a form of LoRA whose trained model is not the one that is saved, loaded, resumed and merged.

    Args:
        settings: `peft_config`.
        wrapped: what `wrap_meta_model` made by it.

    Raises:
        UserError: it is such a form, with the key that makes it one.
    """
    fault = find_fault(wrapped, "train") if settings["peft_type"] == "LORA" else None
    if fault is not None:
        key, reason = fault
        fix = "write true, gaussian or orthogonal" if key == "init_lora_weights" else "leave it out"
        raise UserError.single(f"peft_config.{key}", f"{settings.get(key)} {reason}", fix)


def check_is_loaded(wrapped: PeftModel, folder: Path) -> None:
    """Raise UserError for a saved LoRA that PEFT loads as another one, with the key that makes it so.

    `wrapped` is the model with the adapter of `folder`.
    """
    fault = find_fault(wrapped, "load")
    if fault is not None:
        what = f"its {fault[0]} {fault[1]}"
        raise UserError.single(str(folder / "adapter_config.json"), what, "merge it with the tool that trained it")


def find_fault(model: PeftModel, use: Use) -> tuple[str, str] | None:
    """Return the field of the LoRA config that keeps an adapter from being what its files say, and why; else None.

    Other kinds of adapters are not tried.

    Args:
        model: wrapped by PEFT; on the meta device will do.
        use: what the adapter is for: to be loaded; to be merged; to be trained, saved, resumed and all of that.
    """
    config: Any = model.peft_config["default"]
    layers = _small_layers(model)
    reason = _fault(config, layers, use) if layers else ""
    if not reason:
        return None
    plain: Any = type(config)()
    for name in (field.name for field in dataclasses.fields(config) if field.name not in (*_WHERE, "target_modules")):
        value = getattr(plain, name)
        if getattr(config, name) != value and not _fault(_replace(config, **{name: value}), layers, use):
            return name, reason
    return "peft_type", reason


def _small_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Return a plain layer of random weights for each name that adapted layers have, of at most `_SIDE` a side."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base, short = layer.get_base_layer(), name.rpartition(".")[2]
        side = max(_SIDE, 2 * max(layer.r.values()))
        if isinstance(base, nn.Linear):
            sizes = (min(base.in_features, side), min(base.out_features, side))
            layers.setdefault(short, nn.Linear(*sizes, bias=base.bias is not None))
        elif isinstance(base, nn.Embedding):
            layers.setdefault(short, nn.Embedding(min(base.num_embeddings, side), min(base.embedding_dim, side)))
    return layers


def _replace(config: LoraConfig, **changes: Any) -> LoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataclasses.replace(config, **changes)


def _fault(config: LoraConfig, layers: dict[str, nn.Module], use: Use) -> str:
    """Return what goes wrong with small layers, or ""."""
    where = dict.fromkeys(_WHERE) | {"target_modules": list(layers), "ensure_weight_tying": False}
    small = _replace(config, **where, inference_mode=False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _try(small, layers, use)


def _try(config: LoraConfig, layers: dict[str, nn.Module], use: Use) -> str:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        trained, loaded = _wrap(config, layers), _wrap(config, layers)
    except _FAULTS:
        return ""  # PEFT minds the sizes of these layers: it has its word on the real ones
    bases = {name: layer.get_base_layer().state_dict() for name, layer in _layers_of(trained).items()}
    if use == "train" and any(
        not torch.equal(values, bases[name][key])
        for name, layer in layers.items()
        for key, values in layer.state_dict().items()
    ):
        return "changes the base model's weights as it begins, and the adapter is saved without them"
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = {name: _random_input(layer) for name, layer in layers.items()}
    expected = _outputs(trained, inputs)
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(trained, save_embedding_layers=False))
    if not _are_close(expected, _outputs(loaded, inputs)):
        return "draws random numbers that are not saved: the adapter comes back from its files as another model"
    state = torch.get_rng_state()
    before = _outputs(trained.train(), inputs)
    torch.set_rng_state(state)
    if use == "train" and not _are_close(before, _outputs(loaded.train(), inputs)):
        return "draws random numbers that are not saved: a run that is resumed would go on with others"
    if use == "load":
        return ""
    try:
        trained.eval().merge_and_unload(safe_merge=True)
    except _FAULTS as error:
        return f"cannot be merged into the base model: {error}"
    is_same = _are_close(expected, _outputs(trained, inputs))
    return "" if is_same else "cannot be merged into the base model: the merged layers compute something else"


def _wrap(config: LoraConfig, layers: dict[str, nn.Module]) -> Any:
    from peft import get_peft_model

    return get_peft_model(nn.ModuleDict(copy.deepcopy(layers)), copy.deepcopy(config)).eval()


def _layers_of(model: Any) -> dict[str, Any]:
    return dict(model.base_model.model.items())


def _random_input(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    assert isinstance(layer, nn.Linear)
    return torch.randn(8, layer.in_features)


def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: layer(inputs[name]) for name, layer in _layers_of(model).items()}


def _are_close(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
    return all(
        float((found[name] - output).abs().max()) <= _TOLERANCE * float(output.abs().max())
        for name, output in expected.items()
    )
