"""Features of images that a frozen vision part computes once, for every later epoch and evaluation.

Each image goes through the vision part alone, so that its features do not depend on the batch it first came in: a
resumed run has the same as an uninterrupted one. The features are in one file of the cache folder until the run ends.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.console import show, show_notice
from glm_edge_ft.data.cache import ABANDONED_AFTER_SECONDS, cache_key, default_cache_dir
from glm_edge_ft.distributed import is_local_main_process
from glm_edge_ft.files import format_bytes, free_bytes

if TYPE_CHECKING:
    import torch

FEATURES_FOLDER = "features"
MOST_OF_FREE_SPACE = 0.5


class FeatureStore:
    """One file: a byte for each image that says whether its features are there, then the features, equal in size.

    Several processes may write the same file, since all would write the same bytes. It is read and written, not mapped:
    a disk that becomes full under a memory map kills the process.

    Attributes:
        numbers: the number of each image in the file.
    """

    def __init__(self, path: Path, images: Sequence[str], record_bytes: int) -> None:
        """Open the file, and make it where there is none. Raises OSError when that is not possible."""
        self.path, self.images, self.record_bytes = path, list(images), record_bytes
        self.numbers = {image: number for number, image in enumerate(images)}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.path, self.images, self.record_bytes)  # a loader's process opens the file itself

    def holds(self, number: int) -> bool:
        """Return whether the features of this image are there; False for the number -1."""
        return number >= 0 and os.pread(self._file, 1, number) == b"\1"

    def read(self, number: int) -> bytearray:
        """Return the features of an image that `holds` is true of."""
        return bytearray(os.pread(self._file, self.record_bytes, self._start(number)))

    def write(self, number: int, record: bytes) -> None:
        """Keep an image's features; nothing for the number -1. Raises OSError where the disk is full, or fails."""
        if number >= 0:
            if os.pwrite(self._file, record, self._start(number)) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.pwrite(self._file, b"\1", number)

    def _start(self, number: int) -> int:
        return len(self.images) + number * self.record_bytes


@dataclass
class ImageFeatures:
    """Adds the features of their images to batches.

    Attributes:
        store: the features that are kept.
        vision: pixels (1, 3, 672, 672) to features (1, tokens_per_image, hidden).
        dtype: of the features: that in which the run computes.
        shape: (tokens_per_image, hidden).
        device: where `vision` computes.
        normalize: pixels as the loader emits them to what `vision` takes; None: they are that.
        is_full: whether the disk took no more features.
    """

    store: FeatureStore
    vision: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    shape: tuple[int, int]
    device: torch.device
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_full: bool = False

    def add_image_features(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of `VisionCollator` with `image_features`, (images, tokens_per_image, hidden), on `device`.

        Those that are computed of `pixel_values` are kept. A batch without images stays as it is.
        """
        import torch

        batch = dict(batch)
        if "image_records" not in batch:
            return batch
        records, places = batch.pop("image_records").tolist(), batch.pop("image_pixels").tolist()
        pixels = batch.pop("pixel_values", None)
        computed: dict[int, torch.Tensor] = {}  # by place
        features = []
        for record, place in zip(records, places, strict=True):
            if place >= 0 and place in computed:
                found = computed[place]
            elif self.store.holds(record):
                stored = torch.frombuffer(self.store.read(record), dtype=self.dtype)
                found = stored.reshape(self.shape).to(self.device)
            else:
                found = self._compute(pixels[place])
                self._keep(record, found)
            computed[place] = found
            features.append(found)
        batch["image_features"] = torch.stack(features)
        return batch

    def _compute(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        is_mixed = self.dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed):
            image = pixels.unsqueeze(0).to(self.device)
            return self.vision(self.normalize(image) if self.normalize else image)[0].to(self.dtype)

    def _keep(self, record: int, features: torch.Tensor) -> None:
        import torch

        if self.is_full:
            return
        try:
            self.store.write(record, features.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            self.is_full = True
            show_notice(
                f"features of images can no longer be kept in {self.store.path} ({error.strerror}): the vision part "
                "computes them in every epoch; make room, or write cache_image_features: false"
            )

    def remove(self) -> None:
        """Remove the file; the run has ended. A process that has it open can still read it."""
        if is_local_main_process():
            self.store.path.unlink(missing_ok=True)


def open_image_features(
    model: Any,
    images: Sequence[str],
    image_processor: Any,
    dtype: torch.dtype,
    device: torch.device,
    normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ImageFeatures | None:
    """Return what keeps the features of `images`; None, with a notice, where the disk has no room for them.

    Args:
        model: the vision model with its weights, the vision part frozen.
        images: paths, each once.
        image_processor: of the checkpoint.
        dtype, device, normalize: see `ImageFeatures`.
    """
    import torch

    shape = (model.config.tokens_per_image, model.config.hidden_size)
    record_bytes = shape[0] * shape[1] * dtype.itemsize
    folder, needed = default_cache_dir() / FEATURES_FOLDER, len(images) * record_bytes
    if is_local_main_process():
        _remove_abandoned(folder)
    if not images:
        return None
    if needed > MOST_OF_FREE_SPACE * (free := free_bytes(folder)):
        show_notice(
            f"features of images are not kept: they need {format_bytes(needed)}, and the disk of {folder} has "
            f"{format_bytes(free)} free; with GLM_EDGE_FT_CACHE on a larger disk each image is computed once"
        )
        return None
    files = [(path, (status := Path(path).stat()).st_size, status.st_mtime_ns) for path in images]
    facts = {
        "files": files,
        "weights": _fingerprint(model.model.vision),
        "processor": image_processor.to_json_string(),
        "computed": [str(dtype), device.type, torch.__version__],
        "boot": _boot_time(),  # bytes that the machine did not write before it lost power are not trusted
    }
    try:
        store = FeatureStore(folder / cache_key(facts), images, record_bytes)
    except OSError as error:
        show_notice(f"features of images cannot be kept in {folder} ({error.strerror}): they are computed each time")
        return None
    show(
        f"images: the vision part computes each of {len(images):,} once; until the run ends their features are in "
        f"{folder}, {format_bytes(needed)} at most"
    )
    return ImageFeatures(store, model.model.vision, dtype, shape, device, normalize)


def _boot_time() -> int:
    import psutil

    return int(psutil.boot_time())


def _remove_abandoned(folder: Path) -> None:
    """Remove the files that nothing was written to for two days: runs that were killed left them."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                path.unlink()


def _fingerprint(module: torch.nn.Module) -> str:
    """Return a hash of the weights of a module (BLAKE2b, 128 bits)."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, values in module.state_dict().items():
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
