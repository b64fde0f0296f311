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
    from peft import PeftModel
    from transformers import PreTrainedModel

    from glm_edge_ft.model.loading import Checkpoint

_NO_WEIGHTS_CHANGED = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")


def check_adapter_kind(source: Source) -> None:
    """Raise UserError for an adapter that changes no weights, such as a prefix; a whole model passes."""
    if source.adapter is None or source.adapter.peft_type not in _NO_WEIGHTS_CHANGED:
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
    was_tied = _untie(base)
    wrapped: PeftModel = load_adapter(base, adapter)
    try:
        merged: Any = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise UserError.single(str(adapter), f"PEFT cannot merge this adapter: {error}", "") from error
    if was_tied and torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    return merged


def _untie(model: Any) -> bool:
    """Give a model with tied embeddings a head of its own, so that merging into one leaves the other as it is.

    Returns whether it was tied.
    """
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return False
    head.weight = torch.nn.Parameter(embeddings.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True
