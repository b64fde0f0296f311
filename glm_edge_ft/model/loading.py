"""From the MODEL argument to a tokenizer, a config, an image processor and, last of all, the weights.

`locate_model` needs nothing but the file system and runs before anything heavy is imported. `read_checkpoint` reads
what is small (config, tokenizer, generation config), so that data and adapter settings can be checked against the
real model before the weights are touched. `load_weights` reads them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import UserError
from glm_edge_ft.files import did_you_mean, expand_home
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS, Checkpoint, ModelLocation
from glm_edge_ft.model.hub import read_cached_first
from glm_edge_ft.model.weight_files import find_cached_folder, name_first, refuse_pointers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_ONLY_IN_SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def locate_model(name: str) -> ModelLocation:
    """Return where MODEL is to be read from, without importing anything heavy.

    An embedded model's name wins over a hub id; an existing folder wins over both. Raises UserError when the argument
    can only be a path and no folder is there, or when the folder holds no `config.json`.
    """
    folder = expand_home(name)
    if folder.is_dir():
        return _check_folder(name, folder)
    if name in EMBEDDED_MODELS:
        return _check_folder(name, EMBEDDED_MODELS[name])
    known = ", ".join(sorted(EMBEDDED_MODELS))
    if folder.is_file():
        raise UserError.single(f"MODEL {name}", "is a file, not a folder", "give the folder that holds config.json")
    close = difflib.get_close_matches(name.lower(), EMBEDDED_MODELS, n=1, cutoff=0.85)
    if close and "/" not in name:  # with a slash it may well be a hub id
        raise UserError.single(f"MODEL {name}", "there is no such folder", f"did you mean {close[0]}?")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") != 1:
        raise UserError.single(
            f"MODEL {name}",
            "there is no such folder",
            f"{did_you_mean(folder)}give a folder, a hub id such as owner/model, or one of: {known}",
        )
    return ModelLocation(name=name, source=name, is_local=False)


def _check_folder(name: str, folder: Path) -> ModelLocation:
    folder = folder.absolute()  # a saved adapter names its base model by it, and is used from other folders
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "holds an adapter, not a model" if adapter else "holds no config.json"
        fix = (
            "give the base model here; a run is continued with the RESUME argument"
            if adapter
            else "give a model folder"
        )
        raise UserError.single(f"MODEL {name}", f"the folder {what}", fix)
    if (folder / "adapter_config.json").is_file():
        raise UserError.single(
            f"MODEL {name}",
            "the folder holds a model and an adapter (adapter_config.json), and which of them is meant is not clear",
            "merge the adapter into the model, or give the base model's folder",
        )
    refuse_pointers(f"MODEL {name}", folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise UserError.single(
            f"{folder / 'config.json'}", f"cannot be read as JSON: {error}", "download the model again"
        ) from error
    return ModelLocation(name=name, source=str(folder), is_local=True)


def read_checkpoint(location: ModelLocation) -> Checkpoint:
    """Read config, tokenizer and stop ids of a model; no weights.

    A tokenizer without pad token takes the config's `pad_token_id`, or else the end of sequence. Raises UserError when
    the model cannot be found (for a hub id: neither cached nor reachable), has no fast tokenizer, no chat template, no
    token to pad with, or is of a class that is no causal language model.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    from glm_edge_ft.model.glm_edge_v_config import is_vision_config, read_glm_edge_v_config

    where = f"MODEL {location.name}"
    try:
        config = _read(location, AutoConfig.from_pretrained, trust_remote_code=False)
    except Exception as error:  # a broken file shows in many ways, and each is the file's
        raise UserError.single(where, _why_unreadable(location, error), _what_to_do(location)) from error
    folder = Path(str(cached_file(location.source, "config.json", local_files_only=True))).parent
    if is_vision_config(config) and config.model_type == "glm":
        config = read_glm_edge_v_config(folder)
        config._name_or_path = location.source
    else:
        _check_is_causal(where, config)
    has_tokenizer = [place for place in location.tokenizer_folders[:-1] if _has_chat_tokenizer(Path(place.source))]
    try:
        tokenizer = _read((has_tokenizer or [location])[0], AutoTokenizer.from_pretrained, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises plain Exception
        what = _why_unreadable(location, error, "its tokenizer ")
        raise UserError.single(where, what, _what_to_do(location)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError.single(
            where,
            f"its tokenizer ({type(tokenizer).__name__}) is not a fast one",
            "use a checkpoint with tokenizer.json",
        )
    if not tokenizer.chat_template:
        raise UserError.single(
            where, "its tokenizer has no chat template", "use a chat model, or add chat_template.jinja"
        )
    stop_ids = _read_stop_ids(location, config, tokenizer)
    _set_pad_token(where, config, tokenizer, stop_ids)
    return Checkpoint(location=location, config=config, tokenizer=tokenizer, stop_ids=stop_ids, folder=folder)


def _has_chat_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer with a chat template; not every tool saves one beside an adapter."""
    if not (folder / "tokenizer.json").is_file():
        return False
    settings = folder / "tokenizer_config.json"
    in_settings = settings.is_file() and b'"chat_template"' in settings.read_bytes()
    return in_settings or (folder / "chat_template.jinja").is_file()


def load_image_processor(location: ModelLocation) -> Any:
    """Return the checkpoint's image processor in its Pillow form, which needs no torchvision and is the exact one.

    Raises UserError when the checkpoint has no image processor that can be used.
    """
    from transformers import AutoImageProcessor

    try:
        return _read(location, AutoImageProcessor.from_pretrained, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        fix = "use a GLM-Edge-V checkpoint whose folder holds preprocessor_config.json"
        what = f"its image processor cannot be used: {error}"
        raise UserError.single(f"MODEL {location.name}", what, fix) from error


def _read(location: ModelLocation, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """Call a `from_pretrained` for the location; for a hub id the cache is asked before the network."""
    if location.is_local:
        return from_pretrained(location.source, local_files_only=True, **options)

    def read(cached: bool) -> Any:
        return from_pretrained(location.source, local_files_only=cached, **options)

    return read_cached_first(read)


def _check_is_causal(where: str, config: PretrainedConfig) -> None:
    from transformers import AutoModelForCausalLM

    names = getattr(config, "architectures", None) or []
    unfit = type(config) not in AutoModelForCausalLM._model_mapping
    unfit = unfit or any(not name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if unfit or config.model_type in ("bert", "roberta"):  # these have a causal class, for decoders of two-part models
        shown = f"{config.model_type}: {', '.join(names)}" if names else config.model_type
        raise UserError.single(where, f"is no causal language model ({shown})", "give a chat model, e.g. GLM-Edge")


def _set_pad_token(
    where: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, stop_ids: tuple[int, ...]
) -> None:
    if tokenizer.pad_token_id is not None:
        return
    pad, eos = getattr(config, "pad_token_id", None), tokenizer.eos_token_id
    for token_id in (pad, eos, *stop_ids):
        if isinstance(token_id, int) and 0 <= token_id < len(tokenizer):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token_id)
            return
    raise UserError.single(
        where,
        "neither its tokenizer nor its config says which token pads and which ends a text",
        'download tokenizer_config.json again, or write "pad_token_id" and "eos_token_id" into config.json',
    )


def _why_unreadable(location: ModelLocation, error: Exception, part: str = "") -> str:
    first_line = _first_line(error)
    if "trust_remote_code" in str(error):
        return f"{part}needs Python code that comes with it, and this toolkit runs none"
    if location.is_local:
        return f"{part}cannot be read: {first_line}"
    return f"is neither a folder, nor cached on this machine, nor reachable on the hub ({first_line})"


def _what_to_do(location: ModelLocation) -> str:
    if location.is_local:
        return "the folder needs config.json, tokenizer.json, tokenizer_config.json and the weights as *.safetensors"
    hint = did_you_mean(expand_home(location.name))
    return f"{hint}download the model where there is a network and give its folder as MODEL"


def _read_stop_ids(
    location: ModelLocation, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    from transformers import GenerationConfig

    generation_eos = None
    for place in location.tokenizer_folders:
        try:
            generation_eos = _read(place, GenerationConfig.from_pretrained).eos_token_id
            break
        except OSError:  # the file is optional
            continue
    ids: set[int] = set()
    for value in (generation_eos, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(value)
    return tuple(sorted(ids))


def build_meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model's structure with every weight on the meta device: real names and shapes, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM

    config: Any = checkpoint.config
    pad, vocab_size = config.get_text_config().pad_token_id, config.get_text_config().vocab_size
    if pad is not None and not -vocab_size <= pad < vocab_size:  # as torch.nn.Embedding takes it
        raise UserError.single(
            f"MODEL {checkpoint.location.name}",
            f"pad_token_id {pad} is none of its {vocab_size} ids (transformers takes that number where config.json "
            "states none)",
            f'write "pad_token_id": {checkpoint.tokenizer.pad_token_id} into its config.json',
        )
    try:
        with torch.device("meta"):
            return GlmEdgeVForCausalLM(config) if checkpoint.is_vision else AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError.single(
            f"MODEL {checkpoint.location.name}",
            f"is not a causal language model that transformers knows: {error}",
            "give a chat model",
        ) from error


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, quantization: str | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the weights in `dtype`, with the stop ids written into the generation config.

    With `quantization` (`nf4`) the layers that `model/quantization.py` names are put into 4 bits one by one as they are
    read, and compute in `dtype`. A model in 4 bits, also one that is stored so, is loaded onto `device`; a plain one
    comes on the CPU.

    Weights are read from safetensors only. A checkpoint in which weights of the model are missing is refused, since
    transformers would fill them with random numbers, and so is one with weights left over, since it would drop them.
    Raises UserError for each.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from glm_edge_ft.model.quantization import settle

    options = _quantized_loading(checkpoint, dtype, quantization, device)
    if checkpoint.is_vision:
        return _load_vision_weights(checkpoint, dtype, options)
    where = f"MODEL {checkpoint.location.name}"
    try:
        loaded = _read(
            checkpoint.location,
            AutoModelForCausalLM.from_pretrained,
            config=checkpoint.config,
            dtype=dtype,
            use_safetensors=True,
            adapter_kwargs={"local_files_only": True},  # the look for an adapter asks the hub otherwise
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError.single(
            where, f"its weights cannot be read: {_first_line(error)}", "download the model again"
        ) from error
    model, info = loaded
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        what = f"{len(missing)} weights are missing from its files: {name_first(missing)}"
        raise UserError.single(where, what, "download the model again")
    if surplus:
        what = f"its files hold {len(surplus)} weights that config.json has no place for: {name_first(surplus)}"
        raise UserError.single(where, what, "take config.json and the weights from one download")
    settle(model, dtype)
    carry_stop_ids(model, checkpoint)
    return model


def _quantized_loading(
    checkpoint: Checkpoint, dtype: torch.dtype, quantization: str | None, device: torch.device | str
) -> dict[str, Any]:
    """Return what `from_pretrained` needs besides for a model in 4 bits; nothing for a plain one."""
    from glm_edge_ft.model.quantization import is_stored_in_4_bits, loading_settings

    if is_stored_in_4_bits(checkpoint.config):
        return {"device_map": {"": device}}
    if quantization is None:
        return {}
    settings = loading_settings(build_meta_model(checkpoint), dtype)
    return {"quantization_config": settings, "device_map": {"": device}}


def _load_vision_weights(checkpoint: Checkpoint, dtype: torch.dtype, options: Mapping[str, Any]) -> PreTrainedModel:
    from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
    from glm_edge_ft.model.quantization import settle

    location = checkpoint.location
    cached = None if location.is_local else find_cached_folder(location.source)
    model: Any = load_glm_edge_v(cached or location.source, dtype, **options)
    settle(model, dtype)
    model.name_or_path = model.config._name_or_path = location.source  # a saved adapter names its base model by it
    carry_stop_ids(model, checkpoint)
    return model


def carry_stop_ids(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Write stop ids and pad id into the model's generation config, so that every saved folder stops by itself.

    Settings of sampling that the checkpoint has without `do_sample` take no effect, and transformers 5 refuses to save
    them, at the end of the training: they are left out.
    """
    generation_config: Any = model.generation_config
    if generation_config.do_sample is not True:
        for name in _ONLY_IN_SAMPLING:
            setattr(generation_config, name, None)
    generation_config.eos_token_id = list(checkpoint.stop_ids)
    generation_config.pad_token_id = checkpoint.tokenizer.pad_token_id


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
