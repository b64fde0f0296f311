"""Do the weight files belong to the config? Answered from the headers of the safetensors files, within a second.

A safetensors file begins with the length of its header (8 bytes, little endian) and the header, a JSON object that
gives each tensor's dtype, shape and place (https://huggingface.co/docs/safetensors, "Format"). So names, shapes and
whether a file was cut are known without reading one weight.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.files import LFS_POINTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint, ModelLocation

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_SAME_DOWNLOAD = "config.json and the weights are of different models: take both from one download"
_AGAIN = "download the model again"
_READ_FILES = re.compile(r".*\.(json|jinja)|tokenizer\.model|(adapter_)?model(-\d+-of-\d+)?\.safetensors")
_LARGEST_POINTER = 1024  # bytes, by the specification of Git LFS

Shapes = dict[str, tuple[int, ...]]


def check_weights(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> None:
    """Compare names and shapes in the headers of the weight files with the structure that the config describes.

    `meta_model` is what `build_meta_model` returns. A hub id whose weights are not cached is not checked. Raises
    UserError for files that are missing or cut, and for weights that are missing, of another shape or left over.
    """
    location = checkpoint.location
    folder = Path(location.source) if location.is_local else find_cached_folder(location.source)
    if folder is None:
        return
    where = f"MODEL {location.name}"
    found = _read_shapes(where, folder)
    if _is_renamed_on_load(meta_model):
        return  # the names in the files are not those of the model; loading itself compares them
    problems = _compare(where, found, meta_model)
    if problems:
        raise UserError(problems)


def refuse_pointers(where: str, folder: Path) -> None:
    """Raise UserError where Git LFS left pointers in the place of files of a model or an adapter that are read."""
    found = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(OSError):  # what cannot be read has its own message
            if _READ_FILES.fullmatch(path.name) and path.stat().st_size < _LARGEST_POINTER:
                found += [path.name] if path.read_bytes().startswith(LFS_POINTER) else []
    if found:
        what = f"Git LFS left pointers in the place of {name_first(found)}"
        raise UserError.single(where, what, "fetch the files themselves: run git lfs pull in that folder")


def weights_fingerprint(location: ModelLocation) -> str | None:
    """Return by what a model's weights are known wherever they lie; None where they are not on this machine yet.

    It is a hash of each file's size and header and of samples of its content, so it takes a moment for any size.
    """
    folder = Path(location.source) if location.is_local else find_cached_folder(location.source)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            for number in range(1, _SAMPLES + 1):
                file.seek(max(0, size * number // _SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return None if folder is None else digest.hexdigest()


def find_cached_folder(hub_id: str) -> Path | None:
    """Return the snapshot of a hub id whose weights, or their index, are in the cache of huggingface_hub."""
    from huggingface_hub import try_to_load_from_cache

    for name in (SINGLE_FILE, INDEX_FILE):
        path = try_to_load_from_cache(hub_id, name)
        if isinstance(path, str):
            folder = Path(path).parent
            shards = _read_index(f"MODEL {hub_id}", folder / name) if name == INDEX_FILE else []
            return folder if all((folder / shard).is_file() for shard in shards) else None
    return None


def _read_shapes(where: str, folder: Path) -> Shapes:
    """Return the shape of each weight in the folder, by name. Raises UserError when a file is missing or cut."""
    if (folder / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        files = _read_index(where, folder / INDEX_FILE)
    elif any(folder.glob("*.bin")):
        raise UserError.single(
            where,
            "its weights are *.bin files; these are pickles, which can run code when read, and are not loaded",
            "where you trust them, load the model once with transformers and write it with save_pretrained: "
            "that makes *.safetensors",
        )
    else:
        raise UserError.single(where, f"the folder has neither {SINGLE_FILE} nor {INDEX_FILE}", _AGAIN)
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        what = f"{len(absent)} of {len(files)} weight files are missing: {name_first(absent)}"
        raise UserError.single(where, what, "download these files")
    shapes: Shapes = {}
    problems = []
    for name in files:
        try:
            shapes |= read_header(folder / name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(Problem(str(folder / name), f"its weights cannot be read: {error}", _AGAIN))
    if problems:
        raise UserError(problems)
    return shapes


def _read_index(where: str, path: Path) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.single(where, f"{path.name} is no index of weight files: {error!r}", _AGAIN) from error


def read_header(path: Path) -> Shapes:
    """Return the shape of each tensor in a safetensors file. Raises ValueError when the file is empty or cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"the file was cut at {size} bytes, or is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != wanted:
        raise ValueError(f"the file has {size} bytes, its header speaks of {wanted}")
    return {name: tuple(tensor["shape"]) for name, tensor in header.items()}


def _is_renamed_on_load(model: PreTrainedModel) -> bool:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config = model.config
    quantized = getattr(config, "quantization_config", None) is not None
    return quantized or get_checkpoint_conversion_mapping(config.model_type) is not None


def _compare(where: str, found: Shapes, model: PreTrainedModel) -> list[Problem]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    found = {f"{prefix}{name}" if prefix + name in wanted else name: shape for name, shape in found.items()}
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair if any(one in found for one in pair)}
    missing = _without(wanted.keys() - found.keys() - tied, model._keys_to_ignore_on_load_missing)
    # the second is ignored by transformers on every model: older files carry these buffers
    ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"}
    surplus = _without(found.keys() - wanted.keys(), ignored)
    other = [
        f"{name} {_show(found[name])} in the file, {_show(wanted[name])} by config.json"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    problems = []
    if missing:
        what = f"{len(missing)} weights are missing from its files: {name_first(missing)}"
        problems.append(Problem(where, what, _SAME_DOWNLOAD if surplus or other else _hint_for_missing(missing)))
    if other:
        problems.append(
            Problem(where, f"{len(other)} weights have another shape: {name_first(other, '; ')}", _SAME_DOWNLOAD)
        )
    if surplus:
        what = f"its files hold {len(surplus)} weights that config.json has no place for: {name_first(surplus)}"
        problems.append(Problem(where, what, _SAME_DOWNLOAD))
    return problems


def _hint_for_missing(missing: Iterable[str]) -> str:
    layers = any(re.search(r"\.layers\.\d+\.", name) for name in missing)
    return f"{_AGAIN}, or correct num_hidden_layers in config.json" if layers else _AGAIN


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in patterns or ()))


def _show(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def name_first(names: Iterable[str], separator: str = ", ", count: int = 5) -> str:
    """Return the first names for a message, with dots where there are more."""
    names = list(names)
    return separator.join(names[:count]) + (f"{separator}..." if len(names) > count else "")
