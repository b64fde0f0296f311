"""`python -m glm_edge_ft merge`: an adapter into its base model, as a folder that needs neither of them.

`export-gguf` merges in the same way. Adapters are merged in float32: in 16 bits a small change would be lost to the
rounding of each addition.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.deploy.source import Source, find_source, open_checkpoint
from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.files import atomic_path, can_be_made
from glm_edge_ft.model.quantization import REQUIREMENT, is_installed, not_installed, quantization_settings
from glm_edge_ft.training.deepspeed import skip_deepspeed_import

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint

Format = Literal["float32", "bfloat16", "float16"]

# PEFT's types that put trained vectors before every text, for which a model's files have no place.
PROMPT_TYPES = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "CPT")
_USE_BESIDE = "use it beside its base model"
_PROBE_TOLERANCE = 1e-3  # of the largest logit; rounding in float32 makes some 1e-6


def merge(
    model: str, out: Path, base: str | None = None, dtype: Format | None = None, max_shard_size: str = "5GB"
) -> None:
    """Write the merged model, whole or not at all, with all that is needed beside it.

    Each argument is that of the command line; without `dtype` the weights get the number format of the base model.

    Raises UserError when there is nothing to merge, when the adapter cannot be merged or does not fit its base model,
    and when `out` is not empty or cannot be made.
    """
    source = _check(model, out, base)
    import torch

    from glm_edge_ft.model.saved_folder import complete_saved_folder

    quiet_libraries()
    skip_deepspeed_import()
    checkpoint = open_checkpoint(source)
    check_unquantized(source, checkpoint)
    merged = load_merged(source, checkpoint)
    stored: Any = checkpoint.config.dtype
    if dtype is None and stored is None:
        show_notice("the base model's config.json does not say its number format: float32 is written; see --dtype")
    merged.to(getattr(torch, dtype) if dtype else stored or torch.float32)  # type: ignore[arg-type]
    with atomic_path(out) as staged:
        merged.save_pretrained(staged, max_shard_size=max_shard_size)
        checkpoint.tokenizer.save_pretrained(staged)
        complete_saved_folder(checkpoint, staged)
    parameters = sum(parameter.numel() for parameter in merged.parameters())
    show(f"merged model: {out} ({parameters:,} parameters, {str(merged.dtype).removeprefix('torch.')})")


def _check(model: str, out: Path, base: str | None) -> Source:
    problems = ProblemList()
    where = f"OUT_DIR {out}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        problems.add(where, f"{what}, and nothing is written over", "name a folder that is not there yet")
    elif not can_be_made(out):
        problems.add(where, "cannot be made", "name a folder of yours")
    with problems.collect():
        source = find_source(model, base)
        if source.adapter is None:
            what = "is a whole model: there is nothing to merge"
            raise UserError.single(f"MODEL {source.name}", what, "use the folder as it is")
        check_mergeable(source)
    problems.raise_if_any()
    return source


def check_mergeable(source: Source) -> None:
    """Raise UserError for an adapter that changes no weights, such as a prefix, or the layers; a whole model passes."""
    if source.adapter is None:
        return
    where = f"MODEL {source.name}"
    if source.adapter.replicates_layers:
        what = "its layer_replication makes a model of more layers, each with its own adapter, out of shared weights"
        raise UserError.single(where, what, _USE_BESIDE)
    if source.adapter.peft_type in PROMPT_TYPES:
        what = f"is an adapter of the type {source.adapter.peft_type}, which changes no weights: it puts trained "
        what += "vectors before every text, and a model's files have no place for them"
        raise UserError.single(where, what, f"{_USE_BESIDE}, or train with peft_type: LORA")


def check_unquantized(source: Source, checkpoint: Checkpoint) -> None:
    """Raise UserError for a model whose files are quantized, unless they can be dequantized.

    That is so for the base model of an adapter, where bitsandbytes quantized it and is installed. An adapter that was
    trained on 4-bit weights needs bitsandbytes too.
    """
    where, base = f"MODEL {source.name}", f"its base model {source.location.name}"
    if source.quantization is not None and not is_installed():
        raise UserError([not_installed(where, "its base model was in 4 bits when it was trained")])
    settings = quantization_settings(checkpoint.config)
    if settings is None:
        return
    fix = "give the model that it was quantized from"
    if source.adapter is None:
        raise UserError.single(where, "is stored in a quantized form, which is not read", fix)
    if "bitsandbytes" not in str(settings.get("quant_method")) or checkpoint.is_vision:
        what = f"{base} is stored in a quantized form, whose weights cannot be added to"
        raise UserError.single(where, what, f"{fix}: --base MODEL")
    if not is_installed():
        what = f"{base} is stored in 4 or 8 bits, and bitsandbytes is not installed"
        raise UserError.single(where, what, f"pip install {REQUIREMENT}, or {fix}: --base MODEL")


def load_merged(source: Source, checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the base model in float32 with the adapter added to its weights.

    A base model that was quantized, in its files or by the run, is dequantized first. Embeddings that were tied stay
    tied where both are still the same. Raises UserError when weights cannot be read, the adapter does not fit them, or
    PEFT cannot merge it.
    """
    import torch

    from glm_edge_ft.checks.adapter_trial import check_is_loaded
    from glm_edge_ft.model.loading import load_weights
    from glm_edge_ft.model.saved_folder import load_adapter

    adapter = checkpoint.location.adapter
    assert adapter is not None
    base: Any = load_weights(checkpoint, torch.float32, source.quantization)
    if source.quantization is not None or quantization_settings(checkpoint.config) is not None:
        if source.quantization is None:
            what = "is stored in 4 or 8 bits: its weights are dequantized, rounded as they are; --base with the model "
            what += "that it was quantized from loses nothing"
        else:
            what = "was in 4 bits when the adapter was trained: the adapter is added to those weights, rounded as they "
            what += "are, so that the merged model answers as the run did"
        show_notice(f"base model {checkpoint.location.name} {what}")
        base = base.dequantize(torch.float32).float()
    tied = _tied_weight(base)
    wrapped: Any = load_adapter(base, adapter)
    check_is_loaded(wrapped, adapter)
    if tied is not None:
        _untie(wrapped, tied)
    before = _probe(wrapped)
    try:
        merged: Any = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UserError.single(str(adapter), f"PEFT cannot merge this adapter: {error}") from error
    if tied is not None and torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    difference = float((_probe(merged) - before).abs().max() / before.abs().max())
    if not difference <= _PROBE_TOLERANCE:
        what = f"PEFT cannot merge this adapter: the merged model answers otherwise ({difference:.1e} of its logits)"
        raise UserError.single(str(adapter), what, _USE_BESIDE)
    return merged


def _probe(model: Any) -> torch.Tensor:
    """Return the logits of 16 tokens, `(1, 16, vocab_size)`."""
    import torch

    last = model.config.get_text_config().vocab_size // 2  # special tokens, such as that of images, come after it
    ids = torch.linspace(0, last, 16).long()[None]
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _tied_weight(model: Any) -> torch.nn.Parameter | None:
    """Return the weight that embeddings and head of a model share; None: each has its own."""
    head, weight = model.get_output_embeddings(), model.get_input_embeddings().weight
    return weight if head is not None and head.weight is weight else None


def _untie(model: Any, weight: torch.nn.Parameter) -> None:
    """Give the head of a wrapped model with tied embeddings a weight of its own, so that both are merged apart."""
    import torch

    *_, head = [module for module in model.modules() if module._parameters.get("weight") is weight]
    head.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
