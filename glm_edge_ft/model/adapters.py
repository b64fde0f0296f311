"""PEFT wrapping: LORA, PREFIX_TUNING, or none (full fine-tuning)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.model.glm_edge_v_config import VISION_PREFIX

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What PEFT raises at settings that it cannot use: ImportError where a package for them is not installed.
_REFUSALS = (TypeError, ValueError, KeyError, IndexError, RuntimeError, ImportError, AttributeError, AssertionError)
# Settings that PEFT accepts silently and that cannot be kept here: key, values (None: any but null) and the reason.
_UNSUPPORTED_FORMS = (
    ("init_lora_weights", ("eva", "corda", "lora_ga"), "which needs a pass over the data before training"),
    ("layer_replication", None, "which makes a model of more layers than its files hold: it cannot be merged"),
    ("arrow_config", None, "which routes between adapters that are trained already; here one is trained"),
)


def build_peft_config(settings: Mapping[str, Any], model: PreTrainedModel, keep_vision: bool = False) -> PeftConfig:
    """Return the PEFT config for the `peft_config` section of the YAML.

    LORA without `target_modules` gets PEFT's default for the model's type, or the attention projections where it knows
    none, as for `glm`. SigLIP also calls its projections `q_proj` and so on: in a vision model the names mean those of
    the language model, unless one of them names the vision part (`names_vision`). Raises UserError when PEFT refuses
    the combination of settings, or when the vision part is named although `keep_vision` is set.
    """
    from peft import LoraConfig, LoraRuntimeConfig, PrefixTuningConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    arguments = {key: value for key, value in settings.items() if key not in ("peft_type", "task_type")}
    is_lora = settings["peft_type"] == "LORA"
    if is_lora:
        if arguments.get("target_modules") is None and arguments.get("target_parameters") is None:
            known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            arguments["target_modules"] = list(known.get(model.config.model_type, ATTENTION_PROJECTIONS))
        _exclude_vision(arguments, model, keep_vision)
    else:
        _check_prefix(settings, model)
    try:
        if isinstance(arguments.get("runtime_config"), Mapping):
            arguments["runtime_config"] = LoraRuntimeConfig(**arguments["runtime_config"])
        return (LoraConfig if is_lora else PrefixTuningConfig)(task_type="CAUSAL_LM", **arguments)
    except _REFUSALS as error:
        what = f"PEFT refuses these settings: {error}"
        raise UserError.single("peft_config", what, "correct what it names, or leave it out") from error


def names_vision(targets: Sequence[str] | str | None, model: torch.nn.Module) -> list[str]:
    """Return those of `target_modules` that mean the vision part.

    Such an entry, or pattern, matches modules of the vision part and names it, or matches no others, as `fc1` or
    `dense_4h_to_h` do.
    """
    if targets is None or targets == "all-linear":
        return []
    names = [name for name, _ in model.named_modules() if name]

    def means_vision(entry: str) -> bool:
        matches = _matcher(targets if isinstance(targets, str) else [entry])
        found = [name.startswith(VISION_PREFIX) for name in names if matches(name)]
        return any(found) and ("vision" in entry or all(found))

    return [entry for entry in ([targets] if isinstance(targets, str) else targets) if means_vision(entry)]


def _matcher(targets: Sequence[str] | str) -> Callable[[str], bool]:
    """Return whether PEFT finds a module's name by `target_modules`, a pattern for the whole name or a list of ends.

    Raises UserError where the pattern is none.
    """
    if not isinstance(targets, str):
        return lambda name: any(_ends_in(name, entry) for entry in targets)
    try:
        pattern = re.compile(".*" if targets == "all-linear" else targets)
    except re.error as error:
        what = f"is no regular expression: {targets!r} ({error})"
        fix = "write a list of names, such as [q_proj, v_proj]"
        raise UserError.single("peft_config.target_modules", what, fix) from error
    return lambda name: pattern.fullmatch(name) is not None


def _ends_in(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _exclude_vision(arguments: dict[str, Any], model: PreTrainedModel, keep_vision: bool) -> None:
    """Exclude the vision part from LoRA where its modules match `target_modules` without being meant."""
    targets = arguments.get("target_modules")
    named = names_vision(targets, model)
    if named and keep_vision:
        what = f"{', '.join(map(repr, named))} would train the vision part, which freezeV: true keeps as it is"
        fix = "name modules of the language model, such as q_proj, or write freezeV: false"
        raise UserError.single("peft_config.target_modules", what, fix)
    if named or targets is None:
        return
    matches = _matcher(targets)
    # PEFT warns of an exclusion that excludes nothing
    if any(name.startswith(VISION_PREFIX) and matches(name) for name, _ in model.named_modules()):
        own = arguments.get("exclude_modules") or []
        listed = [own] if isinstance(own, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in own]
        arguments["exclude_modules"] = "|".join([rf"{re.escape(VISION_PREFIX)}.*", *listed])


def _check_prefix(settings: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse a prefix of another shape than the model's keys and values, and one that fills every position.

    PEFT takes these sizes from the model where they are not set; set to something else, they fail in the first step.
    """
    config, problems = model.config, ProblemList()
    sizes = {
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "token_dim": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
    }
    for key, size in sizes.items():
        if settings.get(key) not in (None, size):
            what = f"is {settings[key]}, the model has {size}"
            problems.add(f"peft_config.{key}", what, "leave it out: PEFT takes it from the model")
    width = settings.get("encoder_hidden_size")
    if width not in (None, config.hidden_size) and not settings.get("prefix_projection"):
        fix = "leave it out, or set prefix_projection: true"
        problems.add("peft_config.encoder_hidden_size", f"is {width}, but only a prefix projection has it", fix)
    limit, tokens = getattr(config, "max_position_embeddings", None), settings.get("num_virtual_tokens")
    if isinstance(limit, int) and isinstance(tokens, int) and tokens >= limit:
        what = f"is {tokens}, but the model has only {limit} positions for prefix and text together"
        problems.add("peft_config.num_virtual_tokens", what, "a usual value is 8 to 128")
    problems.raise_if_any()


def wrap_meta_model(
    settings: Mapping[str, Any] | None, meta_model: PreTrainedModel, keep_vision: bool = False
) -> PreTrainedModel | PeftModel:
    """Do to the model on the meta device what `apply_adapter` does to the model with its weights.

    Raises UserError when a named module does not exist in the model or cannot carry LoRA matrices (with the names that
    can), when PEFT refuses, or when a weight of the vision part would be trained although `keep_vision` is set.
    """
    if settings is None:
        return apply_adapter(meta_model, None, keep_vision)
    problems = ProblemList()
    if settings["peft_type"] == "LORA":
        for key, values, reason in _UNSUPPORTED_FORMS:
            value = settings.get(key)
            if value is not None and (values is None or value in values):
                problems.add(f"peft_config.{key}", f"is {value}, {reason}", "leave it out")
        _check_module_names(settings, meta_model, problems)
    problems.raise_if_any()
    _check_target_parameters(settings, meta_model)
    wrapped = _wrap(meta_model, settings, keep_vision, low_cpu_mem_usage=True)
    if keep_vision:
        _check_vision_is_frozen(settings, wrapped)
    _check_quantized_is_frozen(settings, wrapped)
    return wrapped


def _wrap(model: PreTrainedModel, settings: Mapping[str, Any], keep_vision: bool, **options: Any) -> PeftModel:
    from peft import get_peft_model

    from glm_edge_ft.model.fast_layers import share_dropout

    config = build_peft_config(settings, model, keep_vision)
    try:
        wrapped: Any = get_peft_model(model, config, **options)
    except _REFUSALS as error:
        what = f"this adapter does not fit the model: {error}"
        raise UserError.single("peft_config", what, "correct what it names, or leave it out") from error
    share_dropout(wrapped)
    return wrapped


def _check_module_names(settings: Mapping[str, Any], model: PreTrainedModel, problems: ProblemList) -> None:
    """Refuse names that match no module, and targets all of whose modules are no layers that LoRA can adapt."""
    modules = {name: module for name, module in model.named_modules() if name}
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        entries = settings.get(key)
        for entry in entries if isinstance(entries, list | tuple | set) else ():  # PEFT itself checks a pattern
            found = [module for name, module in modules.items() if _ends_in(name, entry)]
            if not found:
                what = f"the model has no module named {entry!r}"
                problems.add(f"peft_config.{key}", what, f"it has: {', '.join(_adaptable_names([model]))}")
            elif key == "target_modules" and not all(_can_be_adapted(module) for module in found):
                inside = ", ".join(_adaptable_names(found) or ATTENTION_PROJECTIONS)
                what = f"{entry!r} is no layer that LoRA can adapt"
                problems.add(f"peft_config.{key}", what, f"name the layers themselves: {inside}")


def _adaptable_names(modules: Sequence[torch.nn.Module]) -> list[str]:
    """Return the last parts of the names of all layers within `modules` that LoRA can adapt."""
    inside = [(name, part) for module in modules for name, part in module.named_modules()]
    return sorted({name.rsplit(".", 1)[-1] for name, part in inside if name and _can_be_adapted(part)})


def _can_be_adapted(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d)


def _check_target_parameters(settings: Mapping[str, Any], meta_model: PreTrainedModel) -> None:
    """Refuse `target_parameters` that are kept in 4 bits: PEFT adds its matrices to the bytes."""
    from glm_edge_ft.model.meta_model import MetaLinear4bit

    names = [f"{name}.weight" for name, module in meta_model.named_modules() if isinstance(module, MetaLinear4bit)]
    for entry in settings.get("target_parameters") or ():
        if any(_ends_in(name, entry) for name in names):
            what = f"{entry!r} is kept in 4 bits, and PEFT can add only to unquantized weights"
            fix = "name the layers in target_modules, or leave quantization out"
            raise UserError.single("peft_config.target_parameters", what, fix)


def _check_quantized_is_frozen(settings: Mapping[str, Any], wrapped: torch.nn.Module) -> None:
    """Refuse to train a layer in 4 bits itself: its weight cannot be, and bitsandbytes rounds its bias in each pass."""
    from glm_edge_ft.model.meta_model import MetaLinear4bit

    trained = [
        f"{name}.{key}"
        for name, module in wrapped.named_modules()
        if isinstance(module, MetaLinear4bit)
        for key, weight in module.named_parameters()
        if weight.requires_grad
    ]
    if trained:
        is_bias = all(name.endswith(".bias") for name in trained)
        key, fix = ("bias", "write bias: none") if is_bias else ("modules_to_save", "name them in target_modules")
        what = f"{settings.get(key)} would train layers that are kept in 4 bits, such as {trained[0]}"
        raise UserError.single(f"peft_config.{key}", what, f"{fix}, or leave quantization out")


def _check_vision_is_frozen(settings: Mapping[str, Any], wrapped: torch.nn.Module) -> None:
    trained = [name for name, weight in wrapped.named_parameters() if weight.requires_grad and VISION_PREFIX in name]
    if trained:
        keys = [key for key in ("modules_to_save", "target_parameters", "trainable_token_indices") if settings.get(key)]
        what = f"{len(trained)} weights of the vision part would be trained, which freezeV: true keeps as it is"
        fix = "name modules of the language model by their whole paths, or write freezeV: false"
        raise UserError.single(f"peft_config.{keys[0]}" if keys else "peft_config", f"{what}: {trained[0]}...", fix)


def apply_adapter(
    model: PreTrainedModel, settings: Mapping[str, Any] | None, keep_vision: bool = False
) -> PreTrainedModel | PeftModel:
    """Return `model` wrapped by PEFT, or as it is, all parameters trainable, when `settings` is None.

    With `keep_vision` nothing of the vision part is trained in either case. All that is trained is in float32 whatever
    the base model's format: the adapter (PEFT's `autocast_adapter_dtype`), and what PEFT trains of the base model with
    it (`modules_to_save`, `bias`), which it would leave in 16 bit, where small updates vanish.

    Raises UserError when PEFT refuses: some ways to initialise read the weights, so that only now it shows.
    """
    if settings is None:
        model.requires_grad_(True)
        if keep_vision:
            freeze_vision(model)
        return model
    wrapped = _wrap(model, settings, keep_vision)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def freeze_vision(model: torch.nn.Module) -> None:
    """Stop tower and adapter of a vision model from being trained; a frozen part is run without building a graph."""
    for name, parameter in model.named_parameters():
        if VISION_PREFIX in name:
            parameter.requires_grad_(False)


def generate(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate with a model that may carry an adapter; returns only the new tokens, `(batch, new_length)`.

    `input_ids` and `attention_mask` are `(batch, length)`, left-padded. Options are those of `generate`.

    PREFIX_TUNING does not go through PEFT's own `generate`: PEFT 0.21 passes the prefix as `past_key_values`, while
    transformers 5.24 has already made an empty `cache`, which wins, so the prefix would be silently ignored. Here the
    cache is filled with the prefix first, and the sequence gets as many placeholder positions on its left, which
    generation takes as already seen.
    """
    import torch

    length = input_ids.shape[1]
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is None or not peft_config.is_prompt_learning:
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        return output[:, length:]
    base, batch, prefix = model.get_base_model(), len(input_ids), peft_config.num_virtual_tokens
    config = options.get("generation_config") or base.generation_config
    # `generate` repeats ids and mask for beams, but not a cache
    beams = options.get("num_beams") or config.num_beams or 1
    sequences = options.get("num_return_sequences") or config.num_return_sequences or 1
    seen = input_ids.new_full((batch, prefix), int(input_ids[0, -1]))  # never embedded: the cache has these positions
    output = base.generate(
        input_ids=torch.cat([seen, input_ids], dim=1),
        attention_mask=torch.cat([attention_mask.new_ones(batch, prefix), attention_mask], dim=1),
        cache=model.get_prompt(batch * max(beams, sequences)),
        **options,
    )
    return output[:, prefix + length :]
