"""Weight files: whether they are whole, which model they belong to, and loading them without a weight invented.

The headers of safetensors files have names and shapes, and say how long a file must be, so files are checked within a
second and without reading a weight.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import ProblemList, UserError, first_line
from glm_edge_ft.files import LFS_POINTER
from glm_edge_ft.model.hub import is_hub_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import ModelLocation

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_AGAIN = "download the model again"
_READ_FILES = re.compile(r".*\.(json|jinja)|tokenizer\.model|(adapter_)?model(-\d+-of-\d+)?\.safetensors")
_LARGEST_POINTER = 1024  # bytes, by the specification of Git LFS


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a safetensors file.

    Raises OSError where there is none, ValueError where it is empty or cut.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{error} (the file has {path.stat().st_size} bytes)") from error


def list_weight_files(where: str, folder: Path) -> list[str]:
    """Return the names of a model's weight files as its index has them. Raises UserError for a damaged index."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return [SINGLE_FILE]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError.single(where, f"{index.name} is no index of weight files: {error!r}", _AGAIN) from error


def find_weights(location: ModelLocation) -> Path | None:
    """Return the folder with a model's weights; None for a hub id whose files are not all in the cache."""
    if location.is_local:
        return Path(location.source)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(location.source, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    names = list_weight_files(f"MODEL {location.name}", folder)
    return folder if all((folder / name).is_file() for name in names) else None


def fetch_weights(location: ModelLocation) -> Path:
    """Return the folder with a model's weights, those of a hub id downloaded. Raises UserError where that fails."""
    found = find_weights(location)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download

    try:
        if not is_hub_reachable():
            raise OSError("they are neither cached on this machine nor within reach on the hub")
        return Path(snapshot_download(location.source, allow_patterns=["*.json", "model*.safetensors"]))
    except (OSError, ValueError) as error:
        what = f"its weights cannot be read: {first_line(error)}"
        raise UserError.single(f"MODEL {location.name}", what, "download the model where there is a network") from error


def check_weight_files(where: str, folder: Path) -> None:
    """Raise UserError for weight files that are missing, cut, or pickles."""
    names = list_weight_files(where, folder)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent == [SINGLE_FILE] and any(folder.glob("*.bin")):
        what = "its weights are *.bin files; these are pickles, which can run code when read, and are not loaded"
        fix = "where you trust them, load the model once with transformers and write it with save_pretrained: "
        raise UserError.single(where, what, f"{fix}that makes *.safetensors")
    if absent == [SINGLE_FILE]:
        raise UserError.single(where, f"the folder has neither {SINGLE_FILE} nor {INDEX_FILE}", _AGAIN)
    if absent:
        what = f"{len(absent)} of {len(names)} weight files are missing: {join_first(absent)}"
        raise UserError.single(where, what, "download these files")
    problems = ProblemList()
    for name in names:
        try:
            read_shapes(folder / name)
        except (OSError, ValueError) as error:
            problems.add(str(folder / name), f"its weights cannot be read: {error}", _AGAIN)
    problems.raise_if_any()


def load_strict(where: str, from_pretrained: Callable[..., Any], source: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model from safetensors whose names and shapes are exactly those of its config.

    transformers fills missing weights and those of another shape with random numbers, and drops those left over. Here
    each is a UserError, as is a file that cannot be read.
    """
    from safetensors import SafetensorError

    try:
        loaded: Any = from_pretrained(
            source,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, with names and shapes
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError.single(where, f"its weights cannot be read: {first_line(error)}", _AGAIN) from error
    model, info = loaded
    mismatched = [f"{name} {_show(stored)} for {_show(wanted)}" for name, stored, wanted in info["mismatched_keys"]]
    problems = ProblemList()
    for names, what in (
        (info["missing_keys"], "weights are missing from its files"),
        (mismatched, "weights have other shapes than config.json says"),
        (info["unexpected_keys"], "weights have no place in the model that config.json describes"),
    ):
        if names:
            fix = "take config.json and the weights from one download"
            problems.add(where, f"{len(names)} {what}: {join_first(sorted(names))}", fix)
    problems.raise_if_any()
    return model


def _show(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def refuse_pointers(where: str, folder: Path) -> None:
    """Raise UserError where Git LFS left pointers in the place of files of a model or an adapter that are read."""
    found = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(OSError):  # what cannot be read has its own message
            if _READ_FILES.fullmatch(path.name) and path.stat().st_size < _LARGEST_POINTER:
                found += [path.name] if path.read_bytes().startswith(LFS_POINTER) else []
    if found:
        what = f"Git LFS left pointers in the place of {join_first(found)}"
        raise UserError.single(where, what, "fetch the files themselves: run git lfs pull in that folder")


def weights_fingerprint(location: ModelLocation) -> str | None:
    """Return a hash that identifies a model's weights wherever they are stored; None where they are not cached.

    It covers each file's size, header and samples of its content, so it takes a moment for any size.
    """
    folder = find_weights(location)
    if folder is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            for number in range(1, _SAMPLES + 1):
                file.seek(max(0, size * number // _SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def join_first(names: Iterable[str], count: int = 5) -> str:
    """Return the first names for a message, with dots where there are more."""
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
