"""Vectors of images that a frozen vision part makes once, and every later epoch and evaluation reads.

Each image goes through the vision part by itself, so that its vectors depend on it alone, not on the batch that it came
in first: a resumed run has the same as one that was never interrupted. The vectors lie in the cache folder until the
run has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.arguments import rows_per_step
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.distributed import is_local_main_process
from glm_edge_ft.files import format_bytes, free_bytes

if TYPE_CHECKING:
    import torch

    from glm_edge_ft.data.dataset import EncodedDataset
    from glm_edge_ft.data.feature_store import FeatureStore
    from glm_edge_ft.run import Prepared

FEATURES_FOLDER = "features"
MOST_OF_FREE_SPACE = 0.5


@dataclass
class ImageFeatures:
    """Completes batches with the vectors of their images.

    Attributes:
        store: where the vectors lie.
        vision: pixels (1, 3, 672, 672) to vectors (1, tokens_per_image, hidden).
        dtype: the format in which they are kept: that in which the run computes.
        shape: (tokens_per_image, hidden).
        device: where `vision` computes.
        pixels: decodes an image, (3, 672, 672); for records that turn out to be damaged.
        scale: pixels (1, 3, 672, 672) as the loader hands them on to what `vision` takes; None: they are that.
    """

    store: FeatureStore
    vision: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    shape: tuple[int, int]
    device: torch.device
    pixels: Callable[[str], Any]
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None

    def add_image_features(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of `VisionCollator` with `image_features`, (images, tokens_per_image, hidden), on `device`.

        Pixels are turned into vectors and these are kept. A batch without images stays as it is.
        """
        import torch

        batch = dict(batch)
        if "image_records" not in batch:
            return batch
        records, places = batch.pop("image_records").tolist(), batch.pop("image_pixels").tolist()
        pixels = batch.pop("pixel_values", None)
        made: dict[int, torch.Tensor] = {}  # by place
        vectors = []
        for record, place in zip(records, places, strict=True):
            known = made.get(place) if place >= 0 else None
            stored = self.store.read(record) if known is None else None
            if stored is not None:
                known = torch.frombuffer(stored, dtype=self.dtype).reshape(self.shape).to(self.device)
            elif known is None:
                image = pixels[place] if place >= 0 else torch.from_numpy(self.pixels(self.store.images[record]))
                known = self._compute(image)
                self._keep(record, known)
            if place >= 0:
                made[place] = known
            vectors.append(known)
        batch["image_features"] = torch.stack(vectors)
        return batch

    def _compute(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        is_mixed = self.dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed):
            image = pixels.unsqueeze(0).to(self.device)
            return self.vision(self.scale(image) if self.scale else image)[0].to(self.dtype)

    def _keep(self, record: int, vectors: torch.Tensor) -> None:
        import torch

        try:
            self.store.write(record, vectors.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            show_notice(
                f"vectors of images can no longer be kept in {self.store.folder} ({error.strerror}): the vision part "
                "computes them anew in every epoch; make room, or write cache_image_features: false"
            )

    def remove(self) -> None:
        """Remove what is kept; the run has ended."""
        if is_local_main_process():
            self.store.remove()


def open_image_features(
    prepared: Prepared,
    model: Any,
    pixels: Callable[[str], Any],
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ImageFeatures | None:
    """Return what keeps the vectors of the run's images; None where they are computed anew each time.

    That is where a weight of the vision part is trained, where it is shared among processes (ZeRO-3), where the config
    says so, where no image is seen twice, and where the disk has no room for them, which is said.

    Args:
        prepared: the run.
        model: the vision model with its weights, and the adapter in place.
        pixels: decodes an image.
        scale: see `ImageFeatures`.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    from glm_edge_ft.data.cache import default_cache_dir
    from glm_edge_ft.data.feature_store import FeatureStore, remove_abandoned, store_key

    vision = model.model.vision
    is_trained = any(parameter.requires_grad for parameter in vision.parameters())
    if is_trained or not prepared.plan.config.cache_image_features or is_deepspeed_zero3_enabled():
        return None
    images = images_seen_again(prepared)
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = formats[prepared.precision.weights]
    dtype = torch.bfloat16 if prepared.precision.bf16 else torch.float16 if prepared.precision.fp16 else dtype
    shape = (model.config.tokens_per_image, model.config.hidden_size)
    record_bytes = shape[0] * shape[1] * dtype.itemsize
    folder = default_cache_dir() / FEATURES_FOLDER
    if is_local_main_process():
        remove_abandoned(folder)
    if not images or not _has_room(folder, len(images) * record_bytes):
        return None
    device = prepared.training_arguments.device
    facts = {
        "weights": _fingerprint(vision),
        "processor": prepared.image_processor.to_json_string(),
        "dtype": str(dtype),
        "computed_by": [device.type, torch.__version__],
    }
    try:
        store = FeatureStore(folder / store_key(images, facts), images, record_bytes)
    except OSError as error:
        show_notice(
            f"vectors of images cannot be kept in {folder} ({error.strerror}): they are computed anew each time"
        )
        return None
    show(
        f"images: the vision part computes each of {len(images):,} once; until the run has ended their vectors lie in "
        f"{folder}, {format_bytes(len(images) * record_bytes)} at most"
    )
    return ImageFeatures(store, vision, dtype, shape, device, pixels, scale)


def images_seen_again(prepared: Prepared) -> list[str]:
    """Return the images that the run needs more than once, each once, in the order of the data.

    In an evaluation that is twice, for the loss and for the replies.
    """
    args, datasets = prepared.training_arguments, prepared.datasets
    rows = (
        args.max_steps * rows_per_step(args) if args.max_steps > 0 else args.num_train_epochs * len(datasets["train"])
    )
    again = {
        "train": rows > len(datasets["train"]),
        "val": args.eval_strategy != "no" or args.eval_on_start,
        "test": args.predict_with_generate,
    }
    return list(dict.fromkeys(path for split in datasets if again[split] for path in _images(datasets[split])))


def _images(dataset: EncodedDataset) -> list[str]:
    return [path for index in range(len(dataset)) for path in dataset.images(index)]


def _has_room(folder: Path, needed: int) -> bool:
    free = free_bytes(folder)
    if needed <= MOST_OF_FREE_SPACE * free:
        return True
    show_notice(
        f"vectors of images are not kept: they need {format_bytes(needed)}, and the disk of {folder} has "
        f"{format_bytes(free)} free; with GLM_EDGE_FT_CACHE on a larger disk each image is computed once"
    )
    return False


def _fingerprint(module: torch.nn.Module) -> str:
    """Return a hash of the weights of a module (BLAKE2b, 128 bits)."""
    import hashlib

    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, values in module.state_dict().items():
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
