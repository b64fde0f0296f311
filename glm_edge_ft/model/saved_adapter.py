"""A saved adapter: what its folder says of it, and putting it onto its base model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.model.weight_files import name_first, read_header, refuse_pointers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_OTHER_BASE = "give the model that it was trained from: --base MODEL"
# PEFT saves embeddings and head whole beside matrices on them
_WHOLE_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", ".base_layer.weight")
_AGAIN = "copy the folder again, or take another checkpoint"


@dataclass(frozen=True)
class SavedAdapter:
    """What `adapter_config.json` says.

    Attributes:
        peft_type: `LORA`, `PREFIX_TUNING`, or another type of PEFT's.
        base: the model that it was trained from, as a folder or hub id; "" where the file does not say.
        prefix_tokens: positions that it takes before the text; 0 unless it is a prefix.
        replicates_layers: whether it makes a model of more layers than its base model has.
    """

    folder: Path
    peft_type: str
    base: str
    prefix_tokens: int = 0
    replicates_layers: bool = False


def read_adapter(folder: Path) -> SavedAdapter:
    """Return what is known of the adapter in `folder` without its weights; imports nothing heavy.

    Raises UserError when its config cannot be read, or its weights are missing, cut, or pickles.
    """
    path = folder / ADAPTER_CONFIG
    refuse_pointers(str(folder), folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, prefix_tokens = config.get("base_model_name_or_path") or "", config.get("num_virtual_tokens") or 0
        replicates_layers = bool(config.get("layer_replication"))
        adapter = SavedAdapter(folder, str(config["peft_type"]), base, prefix_tokens, replicates_layers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.single(str(path), f"is no adapter config: {error!r}", _AGAIN) from error
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "its weights are a *.bin file, a pickle, which can run code when read" if pickled else "is missing"
        fix = "where you trust it, load it once with PEFT and save it with save_pretrained" if pickled else _AGAIN
        raise UserError.single(str(folder if pickled else weights), what, fix)
    try:
        read_header(weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.single(str(weights), f"cannot be read: {error}", _AGAIN) from error
    return adapter


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return `model` with the adapter of `folder` on it, nothing trainable.

    Matrices and prefixes are kept in float32 whatever the model's format, modules that were trained whole
    (`modules_to_save`) in the model's.
    PEFT passes over weights that have no place in the model, and over places that get no weight, with a warning at
    most. Here each is a UserError, and so is whatever PEFT itself refuses, and a LoRA that PEFT loads as another one.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from glm_edge_ft.checks.adapter_trial import find_fault

    _check_prefix_sizes(model, folder)
    try:
        wrapped = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        shown = " ".join(line.strip() for line in lines[:2])
        raise UserError.single(str(folder), f"{_does_not_fit(model)}: {shown}", _OTHER_BASE) from error
    fault = find_fault(wrapped, "load")
    if fault is not None:
        what = f"its {fault[0]} {fault[1]}"
        raise UserError.single(str(folder / ADAPTER_CONFIG), what, "merge it with the tool that trained it")
    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    found = set(read_header(folder / ADAPTER_WEIGHTS))
    surplus = sorted(name for name in found - wanted if not name.endswith(_WHOLE_EMBEDDINGS))
    problems = ProblemList()
    for names, what in ((sorted(wanted - found), "are missing from it"), (surplus, "have no place in the model")):
        if names:
            problems.add(
                str(folder), f"{_does_not_fit(model)}: {len(names)} weights {what}: {name_first(names)}", _OTHER_BASE
            )
    problems.raise_if_any()
    wrapped.requires_grad_(False)  # PEFT leaves a prefix trainable
    return wrapped.eval()


def _check_prefix_sizes(model: PreTrainedModel, folder: Path) -> None:
    """Compare a prefix with the model: PEFT would put it in, and the first reply would fail."""
    settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if settings.get("peft_type") != "PREFIX_TUNING":
        return
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"num_layers": config.num_hidden_layers, "num_attention_heads": heads, "token_dim": heads * head_dim}
    problems = ProblemList()
    for key, real in sizes.items():
        seen = settings.get(key)
        if seen is not None and seen != real:
            problems.add(str(folder), f"{_does_not_fit(model)}: {key} is {seen}, the model has {real}", _OTHER_BASE)
    problems.raise_if_any()


def _does_not_fit(model: PreTrainedModel) -> str:
    return f"this adapter does not fit {model.name_or_path}"
