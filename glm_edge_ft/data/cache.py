"""Encoded rows on disk: memory-mapped arrays in one folder, whole or invisible, found again by a key.

Plain numpy arrays: one flat file of ids, one of mask bytes, one fixed-size record a row. They are appended to while
rows are encoded, so memory does not grow with the row count; opening them costs the same for ten rows and ten million;
and a loader's worker needs nothing but the folder's path. Of images there are the paths as the rows have them, in two
further files: the texts one after another, and where those of each row end. Pixels are never stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from glm_edge_ft.errors import UserError
from glm_edge_ft.files import expand_home

CACHE_VARIABLE = "GLM_EDGE_FT_CACHE"
ABANDONED_AFTER_SECONDS = 2 * 24 * 3600
IDS_FILE, MASK_FILE, ROWS_FILE, META_FILE = "input_ids.bin", "loss_mask.bin", "rows.bin", "meta.json"
IMAGE_PATHS_FILE, IMAGE_ENDS_FILE = "image_paths.bin", "image_ends.bin"
ROW_RECORD = np.dtype(
    [
        ("start", np.int64),
        ("line", np.int64),
        ("file", np.int32),
        ("length", np.int32),
        ("supervised", np.int32),
        ("prompt_tokens_cut", np.int32),
        ("reply_tokens_cut", np.int32),
        ("tail_tokens_cut", np.int32),
        ("system", np.int32),
        ("user", np.int32),
        ("assistant", np.int32),
        ("other", np.int32),
        ("template", np.int32),
        ("image", np.int32),
    ]
)


def default_cache_dir() -> Path:
    """Return the folder of encoded data: `$GLM_EDGE_FT_CACHE`, or `~/.cache/glm_edge_ft`."""
    return expand_home(os.environ.get(CACHE_VARIABLE) or "~/.cache/glm_edge_ft")


def content_hash(path: Path) -> str:
    """Return a fingerprint of a file's bytes (BLAKE2b, 128 bits)."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_key(parts: Any) -> str:
    """Return the folder name for everything that determines the encoded ids: JSON-able data."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the facts of a cache folder, or None if there is none or if it is not whole."""
    try:
        meta: dict[str, Any] = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return meta if whole else None


class CacheWriter:
    """Appends encoded rows to a folder under another name; `finish` completes it and gives it its name.

    Use as a context manager: a folder that is not finished is removed.
    """

    def __init__(self, folder: Path, with_images: bool = False) -> None:
        self.folder = folder
        self.part = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex[:12]}")
        try:
            self.part.mkdir(parents=True)
        except OSError as error:
            raise UserError.single(
                str(folder.parent),
                f"encoded data cannot be written here: {error.strerror}",
                f"set the environment variable {CACHE_VARIABLE} to a folder that can be written",
            ) from None
        _remove_abandoned(folder)
        names = (IDS_FILE, MASK_FILE, ROWS_FILE, *((IMAGE_PATHS_FILE, IMAGE_ENDS_FILE) if with_images else ()))
        self._files: dict[str, BinaryIO] = {name: (self.part / name).open("wb") for name in names}
        self._with_images = with_images
        self._image_bytes = 0
        self.tokens = 0
        self.rows = 0

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.part, ignore_errors=True)

    def append(
        self,
        ids: NDArray[np.int32],
        mask: NDArray[np.bool_],
        records: NDArray[np.void],
        images: Sequence[tuple[str, ...]] = (),
    ) -> None:
        """Append rows: ids (tokens,), mask (tokens,), records (rows,) of `ROW_RECORD`; fills in their `start`.

        `images` are the paths of each row, where the folder is one with images.
        """
        records["start"] = self.tokens + np.concatenate(([0], np.cumsum(records["length"], dtype=np.int64)[:-1]))
        for name, array in ((IDS_FILE, ids), (MASK_FILE, mask), (ROWS_FILE, records)):
            self._files[name].write(array.tobytes())
        if self._with_images:
            texts = [pack_paths(paths) for paths in images]
            ends = self._image_bytes + np.cumsum([len(text) for text in texts], dtype=np.int64)
            self._files[IMAGE_PATHS_FILE].write(b"".join(texts))
            self._files[IMAGE_ENDS_FILE].write(ends.tobytes())
            self._image_bytes += sum(map(len, texts))
        self.tokens += len(ids)
        self.rows += len(records)

    def close(self, meta: dict[str, Any]) -> None:
        """Write the facts: `part` can be read as a data set then, though nobody finds it under its name."""
        for file in self._files.values():
            file.close()
        sizes = {name: (self.part / name).stat().st_size for name in self._files}
        text = json.dumps({**meta, "sizes": sizes}, ensure_ascii=False, indent=1)
        (self.part / META_FILE).write_text(text, encoding="utf-8")

    def finish(self, meta: dict[str, Any]) -> None:
        """Write the facts and rename the folder; another process that was faster wins."""
        self.close(meta)
        if self.folder.exists() and read_meta(self.folder) is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.part.rename(self.folder)
        except OSError:
            if read_meta(self.folder) is None:
                raise


def pack_paths(paths: Sequence[str]) -> bytes:
    """Return the paths of a row as bytes; no path holds a null character."""
    return "\0".join(paths).encode("utf-8", "surrogatepass")


def unpack_paths(text: bytes) -> tuple[str, ...]:
    """Return the paths that `pack_paths` wrote."""
    return tuple(text.decode("utf-8", "surrogatepass").split("\0")) if text else ()


def _remove_abandoned(folder: Path) -> None:
    # What a killed run left behind; one that is still being written is younger.
    for part in folder.parent.glob("*.part-*"):
        try:
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(part, ignore_errors=True)
        except OSError:
            continue


def open_array(path: Path, dtype: Any) -> NDArray[Any]:
    """Return the file as a read-only array; an empty file cannot be mapped and gives an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def display_names(paths: Sequence[Path]) -> list[str]:
    """Return how messages call the files: their names, or their paths where two names are the same."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def total_size(paths: Iterable[Path]) -> int:
    """Return the bytes of the files that exist."""
    return sum(path.stat().st_size for path in paths if path.is_file())
