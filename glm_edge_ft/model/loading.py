"""From the MODEL argument to a tokenizer, a config, an image processor and, last of all, the weights.

`locate_model` needs nothing but the file system and runs before anything heavy is imported. `read_checkpoint` reads
what is small (config, tokenizer, generation config), so that data and adapter settings can be checked against the
real model before the weights are touched. `load_weights` reads them.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import UserError, first_line
from glm_edge_ft.files import did_you_mean, expand_home
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS, Checkpoint, ModelLocation
from glm_edge_ft.model.hub import read_cached_first
from glm_edge_ft.model.weight_files import check_weight_files, fetch_weights, find_weights, load_strict, refuse_pointers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_ONLY_IN_SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def locate_model(name: str) -> ModelLocation:
    """Return where MODEL is to be read from, without importing anything heavy.

    An existing folder is taken before an embedded model, and that before a hub id. Raises UserError when the argument
    can only be a path and no folder is there, or when the folder holds no `config.json`.
    """
    where, folder = f"MODEL {name}", expand_home(name)
    if folder.is_dir() or name in EMBEDDED_MODELS:
        # absolute, since a saved adapter names its base model by it and is used from other folders
        folder = folder.absolute() if folder.is_dir() else EMBEDDED_MODELS[name]
        _check_folder(where, folder)
        return ModelLocation(name=name, source=str(folder), is_local=True)
    if folder.is_file():
        raise UserError.single(where, "is a file, not a folder", "give the folder that holds config.json")
    close = difflib.get_close_matches(name.lower(), EMBEDDED_MODELS, n=1, cutoff=0.85)
    if close and "/" not in name:  # with a slash it may well be a hub id
        raise UserError.single(where, "there is no such folder", f"did you mean {close[0]}?")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") != 1:
        known = ", ".join(sorted(EMBEDDED_MODELS))
        fix = f"{did_you_mean(folder)}give a folder, a hub id such as owner/model, or one of: {known}"
        raise UserError.single(where, "there is no such folder", fix)
    return ModelLocation(name=name, source=name, is_local=False)


def _check_folder(where: str, folder: Path) -> None:
    has_model, has_adapter = ((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if has_adapter and has_model:
        what = "the folder holds a model and an adapter (adapter_config.json), and it is not clear which is meant"
        raise UserError.single(where, what, "merge the adapter into the model, or give the base model's folder")
    if has_adapter:
        fix = "give the base model here; a run is continued with the RESUME argument"
        raise UserError.single(where, "the folder holds an adapter, not a model", fix)
    if not has_model:
        raise UserError.single(where, "the folder holds no config.json", "give a model folder")
    refuse_pointers(where, folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise UserError.single(f"{path}", f"cannot be read as JSON: {error}", "download the model again") from error


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
        raise _unreadable(location, error) from error
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
        raise _unreadable(location, error, "its tokenizer ") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        what = f"its tokenizer ({type(tokenizer).__name__}) is not a fast one"
        raise UserError.single(where, what, "use a checkpoint with tokenizer.json")
    if not tokenizer.chat_template:
        fix = "use a chat model, or add chat_template.jinja"
        raise UserError.single(where, "its tokenizer has no chat template", fix)
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

    def read(cached: bool) -> Any:
        return from_pretrained(location.source, local_files_only=cached, **options)

    return read(True) if location.is_local else read_cached_first(read)


def _unreadable(location: ModelLocation, error: Exception, part: str = "") -> UserError:
    """Return the error of a model, or of a part of it, that cannot be read."""
    fix = "the folder needs config.json, tokenizer.json, tokenizer_config.json and the weights as *.safetensors"
    if not location.is_local:
        hint = did_you_mean(expand_home(location.name))
        fix = f"{hint}download the model where there is a network and give its folder as MODEL"
    what = f"{part}cannot be read: {first_line(error)}"
    if "trust_remote_code" in str(error):
        what = f"{part}needs Python code that comes with it, and this toolkit runs none"
    elif not location.is_local:
        what = f"is neither a folder, nor cached on this machine, nor reachable on the hub ({first_line(error)})"
    return UserError.single(f"MODEL {location.name}", what, fix)


def _check_is_causal(where: str, config: PretrainedConfig) -> None:
    from transformers import AutoModelForCausalLM

    names = config.architectures or []
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
    for token_id in (config.to_dict().get("pad_token_id"), tokenizer.eos_token_id, *stop_ids):
        if isinstance(token_id, int) and 0 <= token_id < len(tokenizer):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token_id)
            return
    what = "neither its tokenizer nor its config says which token pads and which ends a text"
    fix = 'download tokenizer_config.json again, or write "pad_token_id" and "eos_token_id" into config.json'
    raise UserError.single(where, what, fix)


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
    for value in (generation_eos, config.to_dict().get("eos_token_id"), tokenizer.eos_token_id):
        ids.update([] if value is None else [value] if isinstance(value, int) else value)
    return tuple(sorted(ids))


def build_meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model's structure with every weight on the meta device: real names and shapes, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM

    config: Any = checkpoint.config
    where, text = f"MODEL {checkpoint.location.name}", config.get_text_config()
    pad, vocab_size = text.pad_token_id, text.vocab_size
    if pad is not None and not -vocab_size <= pad < vocab_size:  # as torch.nn.Embedding takes it
        what = f"pad_token_id {pad} is none of its {vocab_size} ids (transformers' default where config.json has none)"
        fix = f'write "pad_token_id": {checkpoint.tokenizer.pad_token_id} into its config.json'
        raise UserError.single(where, what, fix)
    try:
        with torch.device("meta"):
            return GlmEdgeVForCausalLM(config) if checkpoint.is_vision else AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        what = f"is not a causal language model that transformers knows: {error}"
        raise UserError.single(where, what, "give a chat model") from error


def check_weights(checkpoint: Checkpoint) -> None:
    """Compare the weight files' headers with the structure that the config describes; reads no weight.

    A hub id whose weights are not cached is not checked, nor are names and shapes in quantized files. Raises UserError
    for files that are missing or cut, and for weights that are missing, of another shape or left over.
    """
    from glm_edge_ft.model.quantization import quantization_settings

    folder = find_weights(checkpoint.location)
    if folder is not None:
        check_weight_files(f"MODEL {checkpoint.location.name}", folder)
        if quantization_settings(checkpoint.config) is None:
            _load(checkpoint, device_map="meta")


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, quantization: str | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the weights in `dtype`, with the stop ids written into the generation config.

    With `quantization` (`nf4`) the layers that `model/quantization.py` names are quantized to 4 bits one by one as they
    are read, and compute in `dtype`. A model in 4 bits, also one that is stored so, is loaded onto `device`; an
    unquantized one onto the CPU.

    Raises UserError when the weights are not whole safetensors files with exactly the weights of the model.
    """
    from glm_edge_ft.model.quantization import bitsandbytes_config, fix_compute_dtype, is_4bit_checkpoint

    options: dict[str, Any] = {"dtype": dtype}
    if is_4bit_checkpoint(checkpoint.config):
        options["device_map"] = {"": device}
    elif quantization is not None:
        options["device_map"] = {"": device}
        options["quantization_config"] = bitsandbytes_config(build_meta_model(checkpoint), dtype)
    model = _load(checkpoint, **options)
    fix_compute_dtype(model, dtype)
    model.name_or_path = model.config._name_or_path = checkpoint.location.source  # a saved adapter names its base by it
    _write_stop_ids(model, checkpoint)
    return model


def _load(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
    from glm_edge_ft.model.glm_edge_v_config import read_glm_edge_v_config

    folder = fetch_weights(checkpoint.location)
    load: Any = AutoModelForCausalLM.from_pretrained
    config = copy.deepcopy(checkpoint.config)
    if checkpoint.is_vision:
        load, config = GlmEdgeVForCausalLM.from_pretrained, read_glm_edge_v_config(folder)
    return load_strict(f"MODEL {checkpoint.location.name}", load, folder, config=config, **options)


def _write_stop_ids(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
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
