"""What a run must know of images before the weights are read: does the model take them, and can each be opened?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm_edge_ft.console import show_notice
from glm_edge_ft.distributed import compute_on_local_main, is_main_process
from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glm_edge_ft.config import RunConfig
    from glm_edge_ft.data.dataset import EncodedDataset
    from glm_edge_ft.data.image_check import ImageCheck
    from glm_edge_ft.data.placeholders import ImageSettings
    from glm_edge_ft.model.checkpoint import Checkpoint


def check_kind_of_model(checkpoint: Checkpoint, config: RunConfig, takes_images: bool) -> None:
    """Refuse a chat model in finetune_vision.py (`takes_images`); give a notice of a vision model in finetune.py.

    Raises UserError.
    """
    name = checkpoint.location.name
    if takes_images and not checkpoint.is_vision:
        raise UserError.single(
            f"MODEL {name}",
            "is a chat model (its config has no vision_config), and finetune_vision.py trains vision models",
            "use finetune.py, or give a GLM-Edge-V model such as glm-edge-v-nano",
        )
    if not takes_images and checkpoint.is_vision:
        show_notice(
            f"MODEL {name} is a vision model: this script trains its language part on text and freezes its vision "
            "part; finetune_vision.py trains on images"
        )
    elif not takes_images and config.freezeV:
        show_notice("freezeV: true has no meaning here: a chat model has no vision tower")


def image_settings(checkpoint: Checkpoint, config: RunConfig, takes_images: bool) -> ImageSettings | None:
    """Return what the encoding needs to know of images; None for a chat model.

    The number of placeholders is that of the checkpoint's geometry, unless the config states another.
    """
    from glm_edge_ft.data.placeholders import ImageSettings

    if not checkpoint.is_vision:
        return None
    model: Any = checkpoint.config
    count = config.image_placeholder_tokens or model.tokens_per_image
    return ImageSettings(model.boi_token_id, count, config.max_images if takes_images else 0)


def check_features(meta_model: PreTrainedModel, checkpoint: Checkpoint, settings: ImageSettings) -> None:
    """Raise UserError where an image has another number of placeholders than the vision part makes features of it."""
    import torch

    vision: Any = meta_model.model.vision
    tower = vision.vit.model.vision_model.config
    pixels = torch.empty(1, tower.num_channels, tower.image_size, tower.image_size, device="meta")
    with torch.no_grad():
        count = int(vision(pixels).shape[1])
    if count != settings.placeholders_per_image:
        raise UserError.single(
            "image_placeholder_tokens",
            f"is {settings.placeholders_per_image}, but MODEL {checkpoint.location.name} makes {count} vectors of an "
            "image, and each takes the place of one token",
            f"leave it out, or write {count}",
        )


def check_images(
    datasets: Mapping[str, EncodedDataset], config: RunConfig
) -> tuple[dict[str, EncodedDataset], ImageCheck]:
    """Open every image once a machine; return the data sets without rows that have bad ones, and what was found.

    Raises UserError for bad images where `on_bad_image` is error, or where no row is left without them.
    """
    from glm_edge_ft.data.cache import default_cache_dir
    from glm_edge_ft.data.image_check import ImageCheck

    check = ImageCheck(config.on_bad_image, progress=is_main_process())
    bad = compute_on_local_main("images", default_cache_dir() / "checks", lambda: check.find_bad(datasets))
    check.take_over(datasets, bad)
    kept, notices = check.of_datasets(datasets)
    for notice in notices:
        show_notice(notice)
    return kept, check
