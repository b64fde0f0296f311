"""An adapter into its base model, in memory: what `merge` saves as a folder and `export-gguf` as one file.

Merged in float32: in 16 bits a small change would be lost to the rounding of each addition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glm_edge_ft.console import show_notice
from glm_edge_ft.deploy.source import Source, quantization_of_run
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.quantization import REQUIREMENT, is_installed, not_installed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint

_NO_WEIGHTS_CHANGED = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "CPT")
_USE_BESIDE = "use it beside its base model"
_PROBE_LENGTH = 16  # tokens
_PROBE_TOLERANCE = 1e-3  # of the largest logit; rounding in float32 makes some 1e-6


def check_adapter_kind(source: Source) -> None:
    """Raise UserError for an adapter that changes no weights, such as a prefix, or the layers; a whole model passes."""
    if source.adapter is None:
        return
    if source.adapter.replicates_layers:
        what = "its layer_replication makes a model of more layers, each with its own adapter, out of shared weights"
        raise UserError.single(f"MODEL {source.name}", what, _USE_BESIDE)
    if source.adapter.peft_type not in _NO_WEIGHTS_CHANGED:
        return
    what = f"is an adapter of the type {source.adapter.peft_type}, which changes no weights: it puts trained "
    what += "vectors before every text, and a model's files have no place for them"
    raise UserError.single(f"MODEL {source.name}", what, "use it beside its base model, or train with peft_type: LORA")


def check_not_quantized(source: Source, checkpoint: Checkpoint) -> None:
    """Raise UserError for a model whose files hold no plain numbers, unless they can be made out of them.

    That is so for the base model of an adapter, where bitsandbytes quantized it and is installed. An adapter that was
    trained on 4-bit numbers needs bitsandbytes too.
    """
    if quantization_of_run(source) is not None and not is_installed():
        raise UserError([not_installed(f"MODEL {source.name}", "its base model was in 4 bits when it was trained")])
    quantization = getattr(checkpoint.config, "quantization_config", None)
    if quantization is None:
        return
    by_bitsandbytes = "bitsandbytes" in str(dict(quantization).get("quant_method"))
    if source.adapter is not None and by_bitsandbytes and not checkpoint.is_vision:
        if is_installed():
            return
        what = f"its base model {source.location.name} is stored in 4 or 8 bits, and bitsandbytes is not installed"
        fix = f"pip install {REQUIREMENT}, or give the model that it was quantized from: --base MODEL"
    elif source.adapter is None:
        what, fix = "is stored in a quantized form, which is not read", "give the model that it was quantized from"
    else:
        what = f"its base model {source.location.name} is stored in a quantized form, whose weights cannot be added to"
        fix = "give the model that it was quantized from: --base MODEL"
    raise UserError.single(f"MODEL {source.name}", what, fix)


def load_merged(checkpoint: Checkpoint, quantization: str | None = None) -> PreTrainedModel:
    """Return the base model in float32 with the adapter of the checkpoint's location added to its weights.

    With `quantization`, that of the run, the adapter is added to what the run had: the 4-bit numbers as plain ones.
    Embeddings that were tied stay tied where both are still the same. Raises UserError when weights cannot be read,
    the adapter does not fit them, or PEFT cannot merge it.
    """
    import torch

    from glm_edge_ft.model.loading import load_weights
    from glm_edge_ft.model.saved_adapter import load_adapter

    adapter = checkpoint.location.adapter
    assert adapter is not None
    base: Any = load_weights(checkpoint, torch.float32, quantization)
    if getattr(base, "is_quantized", False):
        if quantization is None:
            what = "is stored in 4 or 8 bits: it is turned into plain numbers, rounded as they are; --base with the "
            what += "model that it was quantized from loses nothing"
        else:
            what = "was in 4 bits when the adapter was trained: the adapter is added to those numbers, rounded as they "
            what += "are, so that the merged model answers as the run did"
        show_notice(f"base model {checkpoint.location.name} {what}")
        base = base.dequantize(torch.float32).float()
    tied = _tied_weight(base)
    wrapped: Any = load_adapter(base, adapter)
    if tied is not None:
        _untie(wrapped, tied)
    before = _probe(wrapped)
    try:
        merged: Any = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UserError.single(str(adapter), f"PEFT cannot merge this adapter: {error}", "") from error
    if tied is not None and torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    difference = float((_probe(merged) - before).abs().max() / before.abs().max())
    if not difference <= _PROBE_TOLERANCE:
        what = f"PEFT cannot merge this adapter: the merged model answers otherwise ({difference:.1e} of its logits)"
        raise UserError.single(str(adapter), what, _USE_BESIDE)
    return merged


def _probe(model: Any) -> torch.Tensor:
    """Return the logits of some tokens, `(1, _PROBE_LENGTH, vocab_size)`."""
    import torch

    last = model.config.get_text_config().vocab_size // 2  # special tokens, such as that of images, come after it
    ids = torch.linspace(0, last, _PROBE_LENGTH).long()[None]
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
