"""Image files to pixels: opened in every colour mode, preprocessed as the checkpoint does it, checked before training.

Pixels are never stored: the loader's workers open each image anew.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from glm_edge_ft.distributed import count_cores
from glm_edge_ft.errors import UserError, shorten
from glm_edge_ft.files import LFS_POINTER, expand_home

BACKGROUND = (255, 255, 255)
"""What transparent pixels show: white, as on most pages."""

MAXIMUM_PIXELS = 178_956_970
"""Pillow refuses images with more (twice its `MAX_IMAGE_PIXELS`); all threads together decode no more at a time."""

BAD_IMAGE_FIX = "replace the file, correct the path, or set on_bad_image: skip"
_MAXIMUM_THREADS = 16
_STRIP_PIXELS = 1 << 18
_TO_8_BITS = "scale them to 0..255 and save it as an 8-bit PNG"
_UNREAD_FORMATS = {
    "EPS": "this is a PostScript program, which would be run to see it: convert it to PNG",
    "FITS": f"this is a FITS file, whose numbers have no fixed range: {_TO_8_BITS}",
}
_BASE64 = re.compile(r"(^|/)(data:|iVBORw0KGgo|/?9j/|R0lGOD|UklGR)")  # of PNG, JPEG, GIF, WebP
_OTHER_KINDS = {  # how a file begins that Pillow does not read
    re.escape(LFS_POINTER): "this is a pointer of Git LFS, not the image: run git lfs pull where it was cloned",
    rb"\s*<(!doctype|html|\?xml|svg|head)": "this is a text (HTML, XML or SVG), not an image: convert it to PNG",
    rb"....ftyp": "this is a HEIC image or a video, which is not read: convert it to JPEG or PNG",
    rb"II\*\0|MM\0\*": "this is a TIFF of a kind that is not read (colour of 32 bits?): save it as an 8-bit PNG",
    rb"": "this is no image of a known format",
}

# Pillow warns of images of half the size that it refuses. Those are large photographs, which are welcome.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow's blocks of 16 MB stay with the allocator when an image is freed, once for each thread; larger ones do not.
Image.core.set_block_size(64 << 20)


def resolve(path: str, folder: Path) -> str:
    """Return where an image is: `path` as a data file has it, relative to that file's folder, absolute, or from `~`."""
    return str(folder / expand_home(path))


def load_image(path: str | Path) -> Image.Image:
    """Return the image of a file in mode RGB.

    The orientation that a camera noted (EXIF) is applied. Of an animation it is the first frame. Transparent pixels
    are laid over `BACKGROUND`; palettes, CMYK, YCbCr and LAB are converted.

    8 bits a channel stay as they are. Whole numbers of more bits are taken as 16 and divided by 257; of 16-bit colour
    Pillow keeps the upper byte. Floating point numbers are taken as 0..1 and multiplied by 255. Numbers outside of that
    range, or in less than a sixteenth of it (12 bits stored as 16), are refused: the image would be clipped or black.

    Memory: 8 bytes a pixel, for the image as it is stored and as RGB, and what the decoder of the format needs (up to
    12 bytes a pixel in all, 25 for WebP and JPEG 2000).

    Raises:
        UserError: the file cannot be opened, is a pipe or a device, no image, cut off, a program (PostScript), of
            numbers that have no place in 0..255, or has more than `MAXIMUM_PIXELS`, so that it is more likely an
            attack than a photograph.
    """
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # it may wait or be read without end
            raise _UnreadableError("this is a pipe or a device, not a file")
        with Image.open(path) as image:
            if reason := _UNREAD_FORMATS.get(image.format or ""):
                raise _UnreadableError(reason)
            with _DECODING.take(image.width * image.height):
                is_16_bit_colour = any(";16" in str(tile.args) for tile in image.tile)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                result = to_rgb(image, is_16_bit_colour)
                if result is not image:
                    image.close()  # frees its pixels before another thread begins
                return result
    except Exception as error:  # the bytes are foreign, and Pillow's readers raise many kinds
        raise UserError.single(shorten(str(path)), _reason(Path(path), error), BAD_IMAGE_FIX) from None


class _PixelBudget(threading.Condition):
    """Lets threads begin to decode as long as their images together have no more than `MAXIMUM_PIXELS`."""

    free = MAXIMUM_PIXELS

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for an image, and keep it as long as the block lasts."""
        with self:
            self.wait_for(lambda: self.free >= min(pixels, MAXIMUM_PIXELS))
            self.free -= pixels
        try:
            yield
        finally:
            with self:
                self.free += pixels
                self.notify_all()


_DECODING = _PixelBudget()


class _UnreadableError(Exception):
    """A file that is not opened, or not further; the message says why."""


def to_rgb(image: Image.Image, is_16_bit_colour: bool = False) -> Image.Image:
    """Return a loaded image of any mode in mode RGB, itself where it is that; see `load_image`.

    `is_16_bit_colour` says that the file has 16 bits a channel, of which Pillow kept the upper 8.
    """
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(TiffImagePlugin.SAMPLEFORMAT) == (2,) and image.mode == "L":
        raise _UnreadableError(f"its values are signed numbers of 8 bits: {_TO_8_BITS}")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_deep_grey(image, is_inverted=tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0)
    if is_16_bit_colour and image.mode != "CMYK":
        _check_use_of_range(float(np.reshape(image.getextrema(), (-1, 2))[:3].max()) * 257, 65535)
    if image.has_transparency_data:
        return _in_strips(image, _over_background)
    if image.mode == "LAB":
        return _in_strips(image, lambda strip: ImageCms.applyTransform(strip, _lab_transform()))
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image | None]) -> Image.Image:
    """Convert some rows at a time, so that what is computed in between takes little memory."""
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = convert(image.crop((0, top, image.width, min(top + rows, image.height))))
        assert strip is not None  # ImageCms returns None only where it works in place
        result.paste(strip, (0, top))
    return result


def _over_background(image: Image.Image) -> Image.Image:
    pixels = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGBA")).convert("RGBA")
    background = Image.new("RGBA", pixels.size, (*BACKGROUND, 255))
    return Image.alpha_composite(background, pixels).convert("RGB")


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")


def _from_deep_grey(image: Image.Image, is_inverted: bool) -> Image.Image:
    # Pillow's own conversion clips at 255, so that a 16-bit image becomes white.
    transparent = image.info.get("transparency")  # of a 16-bit PNG, the grey that is
    image = image.convert("I") if image.mode.startswith("I;") else image
    whole, kind = (1.0, "floating point") if image.mode == "F" else (65535, "whole")
    low, high = np.ravel(image.getextrema()).tolist()
    rounding = 1 / 510 if image.mode == "F" else 0  # half a step of 8 bits
    if low < -rounding or high > whole + rounding:
        what = f"its {kind} numbers go from {low:g} to {high:g}, those of an image from 0 to {whole:g}"
        raise _UnreadableError(f"{what}: {_TO_8_BITS}")
    _check_use_of_range(high, whole)

    def scale(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip, dtype=np.float64)
        if np.isnan(values).any():
            raise _UnreadableError(f"some of its numbers are not a number (NaN): {_TO_8_BITS}")
        scaled = np.round((whole - values if is_inverted else values).clip(0, whole) / whole * 255).astype(np.uint8)
        if transparent is not None:
            scaled[values == transparent] = BACKGROUND[0]
        return Image.fromarray(scaled).convert("RGB")

    return _in_strips(image, scale)


def _check_use_of_range(high: float, whole: float) -> None:
    if 0 < high < whole / 16:
        what = f"its numbers reach {high:g} of {whole:g}, and it would be nearly black (12 bits stored as 16?)"
        raise _UnreadableError(f"{what}: {_TO_8_BITS}")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, _UnreadableError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"the image has too many pixels: {error}"
    is_no_path = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR)
    if is_no_path and _BASE64.search(str(path)):
        return "this is no path: an image is read from a file, not from text such as base64; save it as one"
    kinds: dict[type[Exception], str] = {
        FileNotFoundError: "there is no such file",
        IsADirectoryError: "this is a folder, not an image",
        PermissionError: "the file may not be read (permission denied)",
    }
    if (known := kinds.get(type(error))) is not None:
        return known
    try:
        with path.open("rb") as file:
            beginning = file.read(64)
    except OSError as unreadable:
        return f"the file cannot be read: {unreadable.strerror}"
    except ValueError as unreadable:  # no file can have such a name
        return f"the file cannot be read: {unreadable}"
    if not beginning:
        return "the file is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        flags = re.IGNORECASE | re.DOTALL
        return next(kind for start, kind in _OTHER_KINDS.items() if re.match(start, beginning, flags))
    return f"the file is damaged or cut off: {error or type(error).__name__}"


def preprocess(image: Image.Image, image_processor: Any) -> NDArray[np.float32]:
    """Return the pixels as the model gets them, (3, height, width) float32: (3, 672, 672) for the released models.

    For those: enlarged or reduced (bicubic) to fit 672 x 672 in its own proportions, at the top left, the rest black,
    then scaled from 0..255 to -1..1.

    Args:
        image: of mode RGB.
        image_processor: of the checkpoint (`model.loading.load_image_processor`).

    Raises:
        UserError: the processor cuts the image into several tiles.
    """
    pixels = np.asarray(image_processor(images=image, return_tensors="np")["pixel_values"], dtype=np.float32)
    tiles = pixels.size // int(np.prod(pixels.shape[-3:]))
    if tiles != 1:
        what = f"cuts an image into {tiles} tiles, the model takes one"
        raise UserError.single("MODEL: preprocessor_config.json", what, "write max_image_tiles: 1")
    return pixels.reshape(pixels.shape[-3:])


def find_bad_images(paths: Iterable[str], progress: bool = True) -> dict[str, str]:
    """Open every image once, whole, in parallel threads; return what is wrong with each bad one.

    `progress` shows a bar on stderr.
    """
    distinct = list(dict.fromkeys(paths))
    pool = ThreadPoolExecutor(min(count_cores(), _MAXIMUM_THREADS))
    try:
        reasons = tqdm(
            pool.map(_what_is_wrong, distinct),
            total=len(distinct),
            desc="opening images",
            unit=" images",
            mininterval=0.5,
            disable=not progress,
        )
        return {path: reason for path, reason in zip(distinct, reasons, strict=True) if reason is not None}
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C the images that wait are not opened first


def _what_is_wrong(path: str) -> str | None:
    try:
        load_image(path)
    except UserError as error:
        return error.problems[0].what
    return None
