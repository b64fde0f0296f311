"""Image files to pixels: opened in every colour mode, checked before training, preprocessed as the checkpoint does it.

Pixels are never stored: the loader's workers call `load_image` and `preprocess` for each row anew. Where they can,
they hand on bytes (`fit`), a quarter of what float32 takes, and the process that computes scales them (`PixelScale`).
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.files import expand_home

BACKGROUND = (255, 255, 255)
"""What transparent pixels show: white, as on most pages."""

MAXIMUM_PROBLEMS_SHOWN = 20
_MAXIMUM_THREADS = 16
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head")
_FIX = "replace the file, correct the path, or set on_bad_image: skip"

# Pillow warns of pictures of half the size that it refuses. Those are large photographs, which are welcome.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def resolve(path: str, folder: Path) -> str:
    """Return where an image is: `path` as a data file has it, relative to that file's folder, absolute, or from `~`."""
    return str(folder / expand_home(path))


def load_image(path: str | Path) -> Image.Image:
    """Return the picture of a file in mode RGB.

    The orientation that a camera noted (EXIF) is applied. Of an animation it is the first frame. Transparent pixels
    are laid over `BACKGROUND`; 16-bit grey is scaled to 8 bits; palettes, CMYK and LAB are converted.

    Raises:
        UserError: the file cannot be opened, is a pipe or a device, no picture, cut off, a program (PostScript), or has
            so many pixels (179 million) that it is more likely an attack than a photograph.
    """
    try:
        _check_regular(Path(path))
        with Image.open(path) as image:
            if image.format == "EPS":
                raise _NoPictureError("this is a PostScript program, which would be run to see it: convert it to PNG")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # the bytes are foreign, and Pillow's readers raise many kinds
        raise UserError.single(str(path), _reason(Path(path), error), _FIX) from None


class _NoPictureError(Exception):
    """A file that is not opened, or not further; the message says why."""


def _check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which may wait or read without end; a folder or a missing file shows later."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _NoPictureError("this is a pipe or a device, not a file")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in mode RGB, itself where it is that; see `load_image`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        pixels = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGBA")).convert("RGBA")
        background = Image.new("RGBA", pixels.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, pixels).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
        assert converted is not None  # it returns None only where it works in place
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, so that a 16-bit picture becomes white.
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    whole = 1.0 if image.mode == "F" else 65535.0
    return Image.fromarray(np.round(np.clip(values / whole, 0.0, 1.0) * 255.0).astype(np.uint8))


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, _NoPictureError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "this is a folder, not a picture"
    if isinstance(error, PermissionError):
        return "the file may not be read (permission denied)"
    if isinstance(error, Image.DecompressionBombError):
        return f"the picture has too many pixels: {error}"
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except (OSError, ValueError) as unreadable:  # ValueError: no file can have such a name
        return f"the file cannot be read: {getattr(unreadable, 'strerror', None) or unreadable}"
    if not beginning:
        return "the file is empty (0 bytes)"
    if beginning.lstrip().lower().startswith(_MARKUP):
        return "this is a text of markup (HTML, XML or SVG), not a picture of pixels"
    if isinstance(error, UnidentifiedImageError):
        return "this is no picture of a known format"
    return f"the file is damaged or cut off: {error or type(error).__name__}"


def find_bad_images(paths: Iterable[str], progress: bool = True) -> dict[str, str]:
    """Open every image once, whole, in parallel threads; return what is wrong with each bad one.

    Args:
        paths: where the images are; each is opened once, however often it is named.
        progress: whether a bar on stderr shows how far it is.
    """
    distinct = list(dict.fromkeys(paths))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bad: dict[str, str] = {}
    pool = ThreadPoolExecutor(min(cores, _MAXIMUM_THREADS))
    try:
        found = zip(distinct, pool.map(_what_is_wrong, distinct), strict=True)
        for path, reason in tqdm(
            found, total=len(distinct), desc="opening images", unit=" images", mininterval=0.5, disable=not progress
        ):
            if reason is not None:
                bad[path] = reason
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C the images that wait are not opened first
    return bad


def _what_is_wrong(path: str) -> str | None:
    try:
        load_image(path)
    except UserError as error:
        return error.problems[0].what
    return None


def bad_image(place: str, path: str, reason: str) -> Problem:
    """Return the problem of a row with a bad image."""
    return Problem(place, f"image {path}: {reason}", _FIX)


def raise_bad_images(places: Mapping[str, Sequence[str]], bad: Mapping[str, str]) -> None:
    """Say which rows use bad images; do nothing where there is none.

    Args:
        places: for each image, where it is, the rows that use it: `file:line`.
        bad: what is wrong with each bad one (`find_bad_images`).

    Raises:
        UserError: for each row with a bad image its place and what is wrong; 20 of them, and a count of the others.
    """
    problems = [bad_image(place, path, reason) for path, reason in bad.items() for place in places[path]]
    more = len(problems) - MAXIMUM_PROBLEMS_SHOWN
    if more > 0:
        what = f"{more} more rows have a bad image"
        problems = [*problems[:MAXIMUM_PROBLEMS_SHOWN], Problem("...", what)]
    if problems:
        raise UserError(problems)


def preprocess(image: Image.Image, image_processor: Any) -> NDArray[np.float32]:
    """Return the pixels as the model gets them, (3, height, width) float32: (3, 672, 672) for the released models.

    For those: enlarged or reduced (bicubic) to fit 672 x 672 in its own proportions, at the top left, the rest black,
    then scaled from 0..255 to -1..1.

    Args:
        image: of mode RGB.
        image_processor: of the checkpoint (`model.loading.load_image_processor`); what it says of tiles and
            proportions is left out.

    Raises:
        UserError: the processor cuts the image into several tiles.
    """
    pixels = _by_processor(image, image_processor)
    if pixels.size != np.prod(pixels.shape[-3:]):
        raise UserError.single(
            "MODEL: preprocessor_config.json",
            f"cuts an image into {pixels.size // int(np.prod(pixels.shape[-3:]))} tiles, the model takes one",
            "write max_image_tiles: 1",
        )
    return pixels.reshape(pixels.shape[-3:])


def _by_processor(image: Image.Image, image_processor: Any) -> NDArray[np.float32]:
    return np.asarray(image_processor(images=image, return_tensors="np")["pixel_values"], dtype=np.float32)


def scales_bytes(image_processor: Any) -> bool:
    """Return whether a processor fits an image into one square tile and scales each value by itself after that.

    Then `fit`, and a table of what each value becomes, give what `preprocess` gives. The released one is such.
    """
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    if type(image_processor) is not MllamaImageProcessorPil:
        return False
    size = image_processor.size
    return bool(image_processor.max_image_tiles == 1 and size["height"] == size["width"])


def fitted_shape(image_processor: Any) -> tuple[int, int, int]:
    """Return the shape of what `fit` writes, (height, width, 3), for a processor that `scales_bytes`."""
    side = int(image_processor.size["height"])
    return side, side, 3


def fit(image: Image.Image, image_processor: Any, canvas: NDArray[np.uint8]) -> None:
    """Write the values that `preprocess` scales into `canvas`, for a processor that `scales_bytes`.

    Args:
        image: of mode RGB.
        image_processor: as in `preprocess`.
        canvas: (height, width, 3), all 0: what the picture leaves free stays so.
    """
    from transformers.models.mllama.image_processing_pil_mllama import get_image_size_fit_to_canvas

    side = len(canvas)
    height, width = get_image_size_fit_to_canvas(image.height, image.width, side, side, side)
    resized = image if image.size == (width, height) else image.resize((width, height), image_processor.resample)
    canvas[:height, :width] = np.asarray(resized)


def scaled_values(image_processor: Any) -> NDArray[np.float32]:
    """Return what a processor that `scales_bytes` makes of each value, (3, 256) float32: it is asked, once."""
    side = int(image_processor.size["height"])
    shades = np.resize(np.arange(256, dtype=np.uint8), (side, side))
    pixels = _by_processor(Image.fromarray(np.stack([shades] * 3, axis=-1)), image_processor).reshape(3, -1)
    return np.ascontiguousarray(pixels[:, :256])
