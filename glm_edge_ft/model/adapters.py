"""PEFT wrapping: LORA, PREFIX_TUNING, or none (full fine-tuning)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.model.glm_edge_v_config import VISION_PREFIX

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What PEFT raises at settings that it cannot use: ImportError where a package for them is not installed.
_REFUSALS = (TypeError, ValueError, KeyError, IndexError, RuntimeError, ImportError, AttributeError, AssertionError)


def build_peft_config(settings: Mapping[str, Any], model: PreTrainedModel, keep_vision: bool = False) -> PeftConfig:
    """Return the PEFT config for the `peft_config` section of the YAML.

    LORA without `target_modules` gets PEFT's default for the model's type, or the attention projections where it knows
    none, as for `glm`. SigLIP calls its projections `q_proj` and so on too: in a vision model the names mean those
    of the language model, unless one of them names the vision part (`names_vision`). Raises UserError when PEFT refuses
    the combination of settings, or when the vision part is named although `keep_vision` is set.
    """
    from peft import LoraConfig, LoraRuntimeConfig, PrefixTuningConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    arguments = {key: value for key, value in settings.items() if key not in ("peft_type", "task_type")}
    is_lora = settings["peft_type"] == "LORA"
    no_target = arguments.get("target_modules") is None and arguments.get("target_parameters") is None
    if is_lora and no_target:  # PEFT's own default too: what a checkpoint was trained with is compared with this
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        arguments["target_modules"] = list(known.get(model.config.model_type, ATTENTION_PROJECTIONS))
    if is_lora:
        _spare_vision(arguments, model, keep_vision)
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
    vision, text = _module_names(model)
    is_pattern = isinstance(targets, str)

    def is_meant(entry: str) -> bool:
        matches = _matcher(entry) if is_pattern else _ends_in(entry)
        return any(map(matches, vision)) and ("vision" in entry or not any(map(matches, text)))

    return [entry for entry in ([targets] if isinstance(targets, str) else targets) if is_meant(entry)]


def _matcher(pattern: str) -> Any:
    """Return what matches the whole of a module's name. Raises UserError where the pattern is none."""
    try:
        return re.compile(pattern).fullmatch
    except re.error as error:
        what = f"is no regular expression: {pattern!r} ({error})"
        fix = "write a list of names, such as [q_proj, v_proj]"
        raise UserError.single("peft_config.target_modules", what, fix) from error


def _spare_vision(arguments: dict[str, Any], model: PreTrainedModel, keep_vision: bool) -> None:
    """Exclude the vision part from LoRA where its modules match `target_modules` without being meant."""
    targets, key = arguments.get("target_modules"), "peft_config.target_modules"
    vision, _ = _module_names(model)
    named = names_vision(targets, model)
    if named and keep_vision:
        what = f"{', '.join(map(repr, named))} would train the vision part, which freezeV: true keeps as it is"
        raise UserError.single(key, what, "name modules of the language model, such as q_proj, or write freezeV: false")
    if named or targets is None:
        return
    if isinstance(targets, str) and targets != "all-linear":
        matches = _matcher(targets)
    else:
        matches = _ends_in(*([""] if targets == "all-linear" else targets))
    if any(map(matches, vision)):  # PEFT warns of an exclusion that excludes nothing
        own = arguments.get("exclude_modules") or []
        listed = [own] if isinstance(own, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in own]
        arguments["exclude_modules"] = "|".join([rf"{re.escape(VISION_PREFIX)}.*", *listed])


def _module_names(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the modules of the vision part, none in a chat model, and of all others."""
    names = [name for name, _ in model.named_modules() if name]
    vision = [name for name in names if name.startswith(VISION_PREFIX)]
    return vision, [name for name in names if not name.startswith(VISION_PREFIX)]


def _ends_in(*entries: str) -> Any:
    """Return a function that says whether a module is one of those that PEFT finds by `entries`."""
    return lambda name: any(not entry or name == entry or name.endswith(f".{entry}") for entry in entries)


def _check_prefix(settings: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse a prefix of another shape than the model's keys and values, and one that fills every position.

    PEFT takes these sizes from the model where they are not set, and fails in the middle of the first step, or trains
    a prefix that is never seen whole, where they are set to something else.
    """
    config = model.config
    heads = config.num_attention_heads
    of_the_model = {
        "num_layers": (config.num_hidden_layers,),
        "num_transformer_submodules": (1,),
        "token_dim": (config.hidden_size,),
        "num_attention_heads": (heads,),
    }
    problems = [
        Problem(
            f"peft_config.{key}",
            f"is {settings[key]}, the model has {values[0]}",
            "leave it out: PEFT takes it from the model",
        )
        for key, values in of_the_model.items()
        if settings.get(key) is not None and settings[key] not in values
    ]
    width = settings.get("encoder_hidden_size")
    if width not in (None, config.hidden_size) and not settings.get("prefix_projection"):
        fix = "leave it out, or set prefix_projection: true"
        problems.append(
            Problem("peft_config.encoder_hidden_size", f"is {width}, but only a prefix projection has it", fix)
        )
    limit, tokens = getattr(config, "max_position_embeddings", None), settings.get("num_virtual_tokens")
    if isinstance(limit, int) and isinstance(tokens, int) and tokens >= limit:
        what = f"is {tokens}, but the model has only {limit} positions for prefix and text together"
        problems.append(Problem("peft_config.num_virtual_tokens", what, "a usual value is 8 to 128"))
    if problems:
        raise UserError(problems)


def check_adapter(settings: Mapping[str, Any], meta_model: PreTrainedModel, keep_vision: bool = False) -> int:
    """Wrap the model's meta twin to see that the adapter fits; return the number of trainable parameters.

    Raises UserError as `wrap_meta_model`.
    """
    return count_parameters(wrap_meta_model(settings, meta_model, keep_vision))[0]


def wrap_meta_model(
    settings: Mapping[str, Any] | None, meta_model: PreTrainedModel, keep_vision: bool = False
) -> PreTrainedModel | PeftModel:
    """Do to the model's meta twin what `apply_adapter` does to the model.

    Raises UserError when a named module does not exist in the model or cannot carry LoRA matrices (with the names that
    can), when PEFT refuses, or when a weight of the vision part would be trained although `keep_vision` is set.
    """
    from peft import get_peft_model

    from glm_edge_ft.model.lora_inputs import share_dropout

    if settings is None:
        return apply_adapter(meta_model, None, keep_vision)
    if settings["peft_type"] == "LORA":
        problems = [*_check_form(settings), *_check_module_names(settings, meta_model)]
        if problems:
            raise UserError(problems)
    _check_whole_weights(settings, meta_model)
    config = build_peft_config(settings, meta_model, keep_vision)
    try:
        wrapped = get_peft_model(meta_model, config, low_cpu_mem_usage=True)
    except _REFUSALS as error:
        what = f"this adapter does not fit the model: {error}"
        raise UserError.single("peft_config", what, "correct what it names, or leave it out") from error
    share_dropout(wrapped)
    if keep_vision:
        _check_vision_is_frozen(settings, wrapped)
    _check_quantized_is_frozen(settings, wrapped)
    return wrapped


def _check_whole_weights(settings: Mapping[str, Any], meta_model: PreTrainedModel) -> None:
    """Refuse `target_parameters` that are kept in 4 bits: PEFT adds its matrices to the bytes."""
    from glm_edge_ft.model.meta_model import MetaLinear4bit

    names = [f"{name}.weight" for name, module in meta_model.named_modules() if isinstance(module, MetaLinear4bit)]
    for entry in settings.get("target_parameters") or ():
        if any(name == entry or name.endswith(f".{entry}") for name in names):
            what = f"{entry!r} is kept in 4 bits, and PEFT can add only to plain numbers"
            raise UserError.single(
                "peft_config.target_parameters", what, "name the layers in target_modules, or leave quantization out"
            )


def _check_quantized_is_frozen(settings: Mapping[str, Any], wrapped: torch.nn.Module) -> None:
    """Refuse to train a layer in 4 bits itself: its weight cannot be, and bitsandbytes rounds its bias in each pass."""
    from glm_edge_ft.model.meta_model import MetaLinear4bit

    trained = {
        name.rpartition(".")[2]: name
        for module_name, module in wrapped.named_modules()
        if isinstance(module, MetaLinear4bit)
        for name in [f"{module_name}.{key}" for key, values in module.named_parameters() if values.requires_grad]
    }
    if not trained:
        return
    key = "bias" if trained.keys() == {"bias"} else "modules_to_save"
    what = f"would train layers that are kept in 4 bits, such as {next(iter(trained.values()))}"
    fix = "write bias: none" if key == "bias" else "name them in target_modules, or leave them out"
    raise UserError.single(f"peft_config.{key}", f"{settings.get(key)} {what}", f"{fix}, or leave quantization out")


def _check_vision_is_frozen(settings: Mapping[str, Any], wrapped: torch.nn.Module) -> None:
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    trained = [name for name in trained if VISION_PREFIX in name]
    if trained:
        keys = [key for key in ("modules_to_save", "target_parameters", "trainable_token_indices") if settings.get(key)]
        what = f"{len(trained)} weights of the vision part would be trained, which freezeV: true keeps as it is"
        fix = "name modules of the language model by their whole paths, or write freezeV: false"
        raise UserError.single(f"peft_config.{keys[0]}" if keys else "peft_config", f"{what}: {trained[0]}...", fix)


def _check_form(settings: Mapping[str, Any]) -> list[Problem]:
    """Refuse what PEFT would take without a word: ways to begin that need the data first, other structures."""
    beginning, key = settings.get("init_lora_weights"), "peft_config.init_lora_weights"
    problems = []
    if beginning in ("eva", "corda", "lora_ga"):
        what = f"is {beginning}, which needs a pass over the data before training; this script makes none"
        problems.append(Problem(key, what, "leave it out, or write true or gaussian"))
    if settings.get("layer_replication"):
        what = "makes a model of more layers than its files hold, which cannot be merged or exported"
        problems.append(Problem("peft_config.layer_replication", what, "leave it out"))
    if settings.get("arrow_config") is not None:
        what = "routes between adapters that are trained already; here one is trained"
        problems.append(Problem("peft_config.arrow_config", what, "leave it out"))
    return problems


def check_is_kept(settings: Mapping[str, Any], wrapped: PeftModel) -> None:
    """Refuse a form of LoRA whose trained model is not the one that is saved, loaded, resumed and merged.

    Args:
        settings: `peft_config`.
        wrapped: what `wrap_meta_model` made by it.

    Raises:
        UserError: it is such a form, with the key that makes it one.
    """
    from glm_edge_ft.checks.adapter_trial import find_fault

    fault = find_fault(wrapped, "train") if settings["peft_type"] == "LORA" else None
    if fault is not None:
        key, reason = fault
        fix = "write true, gaussian or orthogonal" if key == "init_lora_weights" else "leave it out"
        raise UserError.single(f"peft_config.{key}", f"{settings.get(key)} {reason}", fix)


def _check_module_names(settings: Mapping[str, Any], model: PreTrainedModel) -> list[Problem]:
    """Refuse names that match no module, and targets all of whose modules are no layers that LoRA can adapt."""
    names = [name for name, _ in model.named_modules() if name]
    adaptable = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _can_be_adapted(module)})
    problems = []
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        value = settings.get(key)
        if not isinstance(value, list | tuple | set):
            continue  # a pattern or `all-linear`: PEFT itself says when nothing matches
        missing = [entry for entry in value if not any(name == entry or name.endswith(f".{entry}") for name in names)]
        problems += [
            Problem(f"peft_config.{key}", f"the model has no module named {entry!r}", f"it has: {', '.join(adaptable)}")
            for entry in missing
        ]
        if key == "target_modules":
            problems += [
                Problem(
                    f"peft_config.{key}", f"{entry!r} is no layer that LoRA can adapt", f"{_INSIDE}{_inside(found)}"
                )
                for entry in value
                if (found := _find(model, entry)) and not all(_can_be_adapted(module) for module in found)
            ]
    return problems


_INSIDE = "name the layers themselves: "


def _find(model: PreTrainedModel, entry: str) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name == entry or name.endswith(f".{entry}")]


def _inside(modules: list[torch.nn.Module]) -> str:
    """Return the names of the layers below `modules` that can be adapted, or the usual ones where there are none."""
    below = {
        name.rsplit(".", 1)[-1]
        for module in modules
        for name, part in module.named_modules()
        if name and _can_be_adapted(part)
    }
    return ", ".join(sorted(below or ATTENTION_PROJECTIONS))


def _can_be_adapted(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d)


def apply_adapter(
    model: PreTrainedModel, settings: Mapping[str, Any] | None, keep_vision: bool = False
) -> PreTrainedModel | PeftModel:
    """Return `model` wrapped by PEFT, or as it is, all parameters trainable, when `settings` is None.

    With `keep_vision` nothing of the vision part is trained in either case. All that is trained is in float32 whatever
    the base model's format: the adapter (PEFT's `autocast_adapter_dtype`), and what PEFT trains of the base model with
    it (`modules_to_save`, `bias`), which it would leave in 16 bit, where small updates vanish.

    Raises UserError when PEFT refuses: some ways to initialise read the weights, so that only now it shows.
    """
    from peft import get_peft_model

    from glm_edge_ft.model.lora_inputs import share_dropout

    if settings is None:
        model.requires_grad_(True)
        if keep_vision:
            freeze_vision(model)
        return model
    try:
        wrapped = get_peft_model(model, build_peft_config(settings, model, keep_vision))
    except _REFUSALS as error:
        what = f"this adapter does not fit the model: {error}"
        raise UserError.single("peft_config", what, "correct what it names, or leave it out") from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    share_dropout(wrapped)
    return wrapped


def freeze_vision(model: torch.nn.Module) -> None:
    """Stop tower and adapter of a vision model from being trained; a frozen part is run without building a graph."""
    for name, parameter in model.named_parameters():
        if VISION_PREFIX in name:
            parameter.requires_grad_(False)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameter counts."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters())


def generate(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """Generate with a model that may carry an adapter; returns only the new tokens, `(batch, new_length)`.

    `input_ids` and `attention_mask` are `(batch, length)`, left-padded. Options are those of `generate`.

    PREFIX_TUNING does not go through PEFT's own `generate`: PEFT 0.21 hands the prefix over as `past_key_values`,
    while transformers 5.24 has already made an empty `cache` and lets it win, so the prefix would be ignored in
    silence. Here the cache is filled with the prefix first, and the sequence gets as many placeholder positions on
    its left, which generation takes as already seen.
    """
    import torch

    length = input_ids.shape[1]
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is None or not peft_config.is_prompt_learning:
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        return output[:, length:]
    batch, prefix = input_ids.shape[0], peft_config.num_virtual_tokens
    seen = input_ids.new_full(
        (batch, prefix), int(input_ids[0, -1])
    )  # never embedded: these positions lie in the cache
    output = model.get_base_model().generate(
        input_ids=torch.cat([seen, input_ids], dim=1),
        attention_mask=torch.cat([attention_mask.new_ones(batch, prefix), attention_mask], dim=1),
        cache=model.get_prompt(batch * _copies_of_a_row(model, options)),
        **options,
    )
    return output[:, prefix + length :]


def _copies_of_a_row(model: Any, options: Mapping[str, Any]) -> int:
    """Return how many times `generate` repeats each row: it repeats ids and mask for beams, but not a cache."""
    config = options.get("generation_config") or model.get_base_model().generation_config
    names = ("num_beams", "num_return_sequences")
    return max(int(options.get(name) or getattr(config, name, None) or 1) for name in names)
