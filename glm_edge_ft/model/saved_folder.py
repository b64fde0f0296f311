"""A folder with a trained model or adapter: completed for other tools, and an adapter put back onto its base model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.model.weight_files import join_first, read_shapes, refuse_pointers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_OTHER_BASE = "give the model that it was trained from: --base MODEL"
# PEFT saves embeddings and head whole beside matrices on them
_WHOLE_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", ".base_layer.weight")
_AGAIN = "copy the folder again, or take another checkpoint"


def complete_saved_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Add to a folder that holds a trained model or adapter what it needs to be used by itself, as released tools do.

    A vision model gets the checkpoint's image processor, as it is written there. A whole model also gets the fields of
    its release in `config.json`, and the Python files of the model's folder that its `auto_map` names: this toolkit
    runs none of them, but older tools do.
    """
    if checkpoint.is_vision:
        for name in IMAGE_PROCESSOR_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") == "glm":
        from glm_edge_ft.model.glm_edge_v_config import release_fields

        config |= release_fields(config)
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    if checkpoint.location.is_local and config.get("auto_map"):
        for source in sorted(checkpoint.folder.glob("*.py")):
            shutil.copyfile(source, folder / source.name)


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
    path, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    refuse_pointers(str(folder), folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, prefix_tokens = config.get("base_model_name_or_path") or "", config.get("num_virtual_tokens") or 0
        replicates_layers = bool(config.get("layer_replication"))
        adapter = SavedAdapter(folder, str(config["peft_type"]), base, prefix_tokens, replicates_layers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.single(str(path), f"is no adapter config: {error!r}", _AGAIN) from error
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        what = "its weights are a *.bin file, a pickle, which can run code when read"
        fix = "where you trust it, load it once with PEFT and save it with save_pretrained"
        raise UserError.single(str(folder), what, fix)
    try:
        read_shapes(weights)
    except FileNotFoundError as error:
        raise UserError.single(str(weights), "is missing", _AGAIN) from error
    except (OSError, ValueError) as error:
        raise UserError.single(str(weights), f"cannot be read: {error}", _AGAIN) from error
    return adapter


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return `model` with the adapter of `folder` on it, nothing trainable.

    Matrices and prefixes are kept in float32 whatever the model's format, modules that were trained whole
    (`modules_to_save`) in the model's. PEFT only warns of weights that have no place in the model, and of places that
    get no weight. Here each is a UserError, and so is whatever PEFT itself refuses.
    """
    from peft import PeftModel, get_peft_model_state_dict

    misfit = f"this adapter does not fit {model.name_or_path}"
    problems = ProblemList()
    for what in _compare_prefix(model, folder):
        problems.add(str(folder), f"{misfit}: {what}", _OTHER_BASE)
    problems.raise_if_any()
    try:
        wrapped = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        shown = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or type(error).__name__
        raise UserError.single(str(folder), f"{misfit}: {shown}", _OTHER_BASE) from error
    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    found = set(read_shapes(folder / ADAPTER_WEIGHTS))
    surplus = [name for name in found - wanted if not name.endswith(_WHOLE_EMBEDDINGS)]
    for names, what in ((wanted - found, "are missing from it"), (surplus, "have no place in the model")):
        if names:
            shown = f"{len(names)} weights {what}: {join_first(sorted(names))}"
            problems.add(str(folder), f"{misfit}: {shown}", _OTHER_BASE)
    problems.raise_if_any()
    wrapped.requires_grad_(False)  # PEFT leaves a prefix trainable
    return wrapped.eval()


def _compare_prefix(model: PreTrainedModel, folder: Path) -> list[str]:
    """Return where a prefix differs from the model in size: PEFT would accept it, and the first reply would fail."""
    settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if settings.get("peft_type") != "PREFIX_TUNING":
        return []
    config: Any = model.config
    fields = config.to_dict()
    heads = fields.get("num_key_value_heads") or config.num_attention_heads
    head_dim = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    sizes = {"num_layers": config.num_hidden_layers, "num_attention_heads": heads, "token_dim": heads * head_dim}
    return [
        f"{key} is {settings[key]}, the model has {size}"
        for key, size in sizes.items()
        if settings.get(key) not in (None, size)
    ]
