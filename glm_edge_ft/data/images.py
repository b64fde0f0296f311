"""Image files to pixels: opened in every colour mode, checked before training, preprocessed as the checkpoint does it.

Pixels are never stored: the loader's workers call `load_image` and `preprocess` for each row anew. Where they can,
they return bytes (`fit`), a quarter of what float32 takes, and the process that computes normalizes them
(`PixelNormalizer`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from glm_edge_ft.distributed import count_cores
from glm_edge_ft.errors import Problem, UserError, shorten
from glm_edge_ft.files import LFS_POINTER, expand_home

BACKGROUND = (255, 255, 255)
"""What transparent pixels show: white, as on most pages."""

MAXIMUM_PROBLEMS_SHOWN = 20
MAXIMUM_PIXELS = 178_956_970
"""Pillow refuses pictures with more (twice its `MAX_IMAGE_PIXELS`); all threads together decode no more at a time."""

_MAXIMUM_THREADS = 16
_STRIP_PIXELS = 1 << 18
_FIX = "replace the file, correct the path, or set on_bad_image: skip"
_TO_8_BITS = "scale them to 0..255 and save it as an 8-bit PNG"
_UNREAD_FORMATS = {
    "EPS": "this is a PostScript program, which would be run to see it: convert it to PNG",
    "FITS": "this is a FITS file, whose numbers have no fixed range: scale them to 0..255 and save it as an 8-bit PNG",
}
_BASE64 = re.compile(r"(^|/)(data:|iVBORw0KGgo|/?9j/|R0lGOD|UklGR)")  # of PNG, JPEG, GIF, WebP
_NO_SUCH_PATH = (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR)
_OTHER_KINDS = (  # how a file begins that no reader takes
    (re.escape(LFS_POINTER), "this is a pointer of Git LFS, not the picture: run git lfs pull where it was cloned"),
    (
        rb"\s*<(!doctype|html|\?xml|svg|head)",
        "this is a text of markup (HTML, XML or SVG), not a picture of pixels: download it anew, or convert it to PNG",
    ),
    (rb"....ftyp", "this is a HEIC picture or a video, which is not read: convert it to JPEG or PNG"),
    (rb"II\*\0|MM\0\*", "this is a TIFF of a kind that is not read (colour of 32 bits?): save it as an 8-bit PNG"),
    (rb"", "this is no picture of a known format"),
)

# Pillow warns of pictures of half the size that it refuses. Those are large photographs, which are welcome.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow's blocks of 16 MB stay with the allocator when a picture is freed, once for each thread; larger ones do not.
Image.core.set_block_size(64 << 20)


def resolve(path: str, folder: Path) -> str:
    """Return where an image is: `path` as a data file has it, relative to that file's folder, absolute, or from `~`."""
    return str(folder / expand_home(path))


def load_image(path: str | Path) -> Image.Image:
    """Return the picture of a file in mode RGB.

    The orientation that a camera noted (EXIF) is applied. Of an animation it is the first frame. Transparent pixels
    are laid over `BACKGROUND`; palettes, CMYK, YCbCr and LAB are converted.

    8 bits a channel stay as they are. Whole numbers of more bits are taken as 16 and divided by 257; of 16-bit colour
    Pillow keeps the upper byte. Floating point numbers are taken as 0..1 and multiplied by 255. What lies outside of
    that range, or uses less than a sixteenth of it (12 bits stored as 16), is refused: it would be clipped, or nearly
    black.

    Memory: 8 bytes a pixel, for the picture as it is stored and as RGB, and what the decoder of the format needs (up to
    12 bytes a pixel in all, 25 for WebP and JPEG 2000).

    Raises:
        UserError: the file cannot be opened, is a pipe or a device, no picture, cut off, a program (PostScript), of
            numbers that have no place in 0..255, or has more than `MAXIMUM_PIXELS`, so that it is more likely an
            attack than a photograph.
    """
    try:
        _check_regular(Path(path))
        with Image.open(path) as image:
            if reason := _UNREAD_FORMATS.get(image.format or ""):
                raise _NoPictureError(reason)
            with _DECODING.take(image.width * image.height):
                is_16_bit_colour = any(";16" in str(tile.args) for tile in image.tile)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                result = to_rgb(image, is_16_bit_colour)
                if result is not image:
                    image.close()  # frees its pixels before another thread begins
                return result
    except Exception as error:  # the bytes are foreign, and Pillow's readers raise many kinds
        raise UserError.single(shorten(str(path)), _reason(Path(path), error), _FIX) from None


class _PixelBudget:
    """Lets threads begin to decode as long as their pictures together have no more than `pixels`."""

    def __init__(self, pixels: int) -> None:
        self.whole = self.free = pixels
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for a picture, and keep it as long as the block lasts."""
        pixels = min(pixels, self.whole)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


_DECODING = _PixelBudget(MAXIMUM_PIXELS)


class _NoPictureError(Exception):
    """A file that is not opened, or not further; the message says why."""


def _check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which may wait or read without end; a folder or a missing file shows later."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _NoPictureError("this is a pipe or a device, not a file")


def to_rgb(image: Image.Image, is_16_bit_colour: bool = False) -> Image.Image:
    """Return an image of any mode in mode RGB, itself where it is that; see `load_image`.

    Args:
        image: the picture, loaded.
        is_16_bit_colour: whether the file has 16 bits a channel, of which Pillow kept the upper 8.
    """
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(TiffImagePlugin.SAMPLEFORMAT) == (2,) and image.mode == "L":
        raise _NoPictureError(f"its values are signed numbers of 8 bits: {_TO_8_BITS}")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_deep_grey(image, is_negative=tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0)
    if is_16_bit_colour and image.mode != "CMYK":
        _check_use_of_range(float(np.reshape(image.getextrema(), (-1, 2))[:3].max()) * 257, 65535)
    if image.has_transparency_data:
        return _in_strips(image, _over_background)
    if image.mode == "LAB":
        return _in_strips(image, _from_lab)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert some rows at a time, so that what lies between takes little memory."""
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(convert(strip), (0, top))
    return result


def _over_background(image: Image.Image) -> Image.Image:
    pixels = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGBA")).convert("RGBA")
    background = Image.new("RGBA", pixels.size, (*BACKGROUND, 255))
    return Image.alpha_composite(background, pixels).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, _lab_transform())
    assert converted is not None  # it returns None only where it works in place
    return converted


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")


def _from_deep_grey(image: Image.Image, is_negative: bool) -> Image.Image:
    # Pillow's own conversion clips at 255, so that a 16-bit picture becomes white.
    transparent = image.info.get("transparency")  # of a 16-bit PNG, the grey that is
    image = image.convert("I") if image.mode.startswith("I;") else image
    whole, kind = (1.0, "floating point") if image.mode == "F" else (65535, "whole")
    low, high = np.ravel(image.getextrema()).tolist()
    rounding = 1 / 510 if image.mode == "F" else 0  # half a step of 8 bits
    if low < -rounding or high > whole + rounding:
        what = f"its {kind} numbers go from {low:g} to {high:g}, those of a picture from 0 to {whole:g}"
        raise _NoPictureError(f"{what}: {_TO_8_BITS}")
    _check_use_of_range(high, whole)

    def scale(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip, dtype=np.float64)
        if np.isnan(values).any():
            raise _NoPictureError(f"some of its numbers are not a number (NaN): {_TO_8_BITS}")
        scaled = np.round((whole - values if is_negative else values).clip(0, whole) / whole * 255).astype(np.uint8)
        if transparent is not None:
            scaled[values == transparent] = BACKGROUND[0]
        return Image.fromarray(scaled).convert("RGB")

    return _in_strips(image, scale)


def _check_use_of_range(high: float, whole: float) -> None:
    if 0 < high < whole / 16:
        what = f"its numbers reach {high:g} of {whole:g}, and it would be nearly black (12 bits stored as 16?)"
        raise _NoPictureError(f"{what}: {_TO_8_BITS}")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, _NoPictureError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _NO_SUCH_PATH and _BASE64.search(str(path)):
        return "this is no path: a picture is read from a file, not from text such as base64; save it as one"
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
    if isinstance(error, UnidentifiedImageError):
        return next(kind for start, kind in _OTHER_KINDS if re.match(start, beginning, re.IGNORECASE | re.DOTALL))
    return f"the file is damaged or cut off: {error or type(error).__name__}"


def find_bad_images(paths: Iterable[str], progress: bool = True) -> dict[str, str]:
    """Open every image once, whole, in parallel threads; return what is wrong with each bad one.

    Args:
        paths: where the images are; each is opened once, however often it is named.
        progress: whether a bar on stderr shows how far it is.
    """
    distinct = list(dict.fromkeys(paths))
    cores = count_cores()
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
    return Problem(place, f"image {shorten(path)}: {reason}", _FIX)


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
