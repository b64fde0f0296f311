"""Image files as RGB: every colour mode, and every kind of bad file."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glm_edge_ft.data.images import find_bad_images, load_image, resolve, to_rgb
from glm_edge_ft.errors import UserError, shorten

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pixels_of(image: Image.Image) -> list[Any]:
    """Return the pixels row by row, each as its three values."""
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def two_pixels(mode: str, first: Any, second: Any) -> Image.Image:
    """Return an image of two pixels beside each other."""
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), first)
    image.putpixel((1, 0), second)
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (two_pixels("RGB", RED, BLUE), [[255, 0, 0], [0, 0, 255]]),
        (two_pixels("L", 7, 200), [[7, 7, 7], [200, 200, 200]]),
        (two_pixels("1", 0, 255), [[0, 0, 0], [255, 255, 255]]),
        (two_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), [[255, 0, 0], [0, 0, 0]]),
        (two_pixels("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), [[255, 255, 255], [0, 0, 255]]),
        (two_pixels("RGBA", (0, 0, 0, 51), (255, 0, 0, 51)), [[204, 204, 204], [255, 204, 204]]),
        (two_pixels("LA", (0, 0), (9, 255)), [[255, 255, 255], [9, 9, 9]]),
        (two_pixels("La", (0, 0), (9, 255)), [[255, 255, 255], [9, 9, 9]]),
        (two_pixels("RGBa", (0, 0, 0, 0), (0, 0, 255, 255)), [[255, 255, 255], [0, 0, 255]]),
        (two_pixels("I;16", 0, 65535), [[0, 0, 0], [255, 255, 255]]),
        (two_pixels("I", 257 * 100, 65535), [[100, 100, 100], [255, 255, 255]]),
        (two_pixels("F", 0.2, 1.0), [[51, 51, 51], [255, 255, 255]]),
        (two_pixels("YCbCr", (76, 85, 255), (255, 128, 128)), [[254, 0, 0], [255, 255, 255]]),
        (two_pixels("HSV", (0, 255, 255), (0, 0, 0)), [[255, 0, 0], [0, 0, 0]]),
        (two_pixels("LAB", (255, 128, 128), (128, 128, 128)), [[254, 255, 254], [119, 119, 119]]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: list[list[int]]) -> None:
    """I3: grey, 16 bits, CMYK, LAB and transparency over white."""
    assert pixels_of(to_rgb(image)) == expected


def test_a_path_from_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K24: as in every argument; a user who is not there leaves the path as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a.png", Path("data")) == str(tmp_path / "a.png")
    assert resolve("~nosuchuser/a.png", Path("data")) == str(Path("data", "~nosuchuser", "a.png"))
    assert resolve("b/~/a.png", Path("data")) == str(Path("data", "b", "~", "a.png"))


def test_a_16_bit_grey_png_is_not_white(tmp_path: Path) -> None:
    """I3: the values are scaled, not clipped, as Pillow's own conversion would."""
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert pixels_of(load_image(tmp_path / "deep.png")) == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def save_array(path: Path, values: Any, dtype: Any, **options: Any) -> Path:
    """Save numbers as a picture of one row, in the kind that Pillow has for their type."""
    Image.fromarray(np.array([values], dtype=dtype)).save(path, **options)
    return path


PEAK_OF_OPENING = """
import os, sys
from glm_edge_ft.data.images import find_bad_images
os.sched_getaffinity = lambda _: set(range(16))
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
assert find_bad_images(sys.argv[1:], progress=False) == {}
print(peak() - before)
"""


def tiff(path: Path, pixels: bytes, bits: int, channels: int, sample_format: int, photometric: int) -> Path:
    """Write a TIFF of two pixels by hand, of a kind that Pillow reads and does not write."""
    tags = [
        (256, 4, 1, 2),
        (257, 4, 1, 1),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
    ]
    tags += [(278, 4, 1, 1), (279, 4, 1, len(pixels)), (339, 3, 1, sample_format)]
    after = 8 + len(pixels) + len(pixels) % 2
    tags.append((258, 3, 1, bits) if channels == 1 else (258, 3, channels, after))
    shared = b"" if channels == 1 else struct.pack(f"<{channels}H", *[bits] * channels)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    head = b"II*\0" + struct.pack("<I", after + len(shared))
    path.write_bytes(head + pixels.ljust(after - 8, b"\0") + shared + directory)
    return path


@pytest.mark.parametrize(
    ("values", "dtype", "seen"),
    [
        ([0.0, 255.0], np.float32, "floating point numbers go from 0 to 255, those of an image from 0 to 1"),
        ([-1000.0, 2000.0], np.float32, "floating point numbers go from -1000 to 2000"),
        ([0.5, np.nan], np.float32, "numbers are not a number (NaN)"),
        ([np.nan, 0.5], np.float32, "numbers are not a number (NaN)"),
        ([0.5, np.inf], np.float32, "floating point numbers go from 0.5 to inf"),
        ([0.0, 0.003], np.float32, "numbers reach 0.003 of 1, and it would be nearly black"),
        ([0, 255], np.int32, "numbers reach 255 of 65535, and it would be nearly black"),
        ([-1000, 2000], np.int32, "whole numbers go from -1000 to 2000, those of an image from 0 to 65535"),
        ([0, 70000], np.int32, "whole numbers go from 0 to 70000, those of an image from 0 to 65535"),
        ([0, 4095], np.uint16, "numbers reach 4095 of 65535, and it would be nearly black"),
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_numbers_without_a_place_in_8_bits_are_refused(
    tmp_path: Path, values: Any, dtype: Any, seen: str, compression: str | None
) -> None:
    """K26: neither clipped to white nor left nearly black."""
    path = save_array(tmp_path / "a.tiff", values, dtype, compression=compression)
    (reason,) = find_bad_images([str(path)], progress=False).values()
    assert f"its {seen}" in reason
    assert reason.endswith("save it as an 8-bit PNG")


def test_12_bits_in_a_16_bit_png_are_refused(tmp_path: Path) -> None:
    """K26: grey and colour, of which Pillow keeps the upper byte alone, 15 of 255."""
    save_array(tmp_path / "grey.png", [0, 4095], np.uint16)
    tiff(tmp_path / "colour.tiff", struct.pack("<6H", *[4095] * 6), bits=16, channels=3, sample_format=1, photometric=2)
    for name in ("grey.png", "colour.tiff"):
        with pytest.raises(UserError, match="nearly black"):
            load_image(tmp_path / name)


def test_what_keeps_its_content_is_kept(tmp_path: Path) -> None:
    """K26: 16 bits are divided by 257, floating point numbers multiplied by 255, what is black stays so."""
    thirds = [[0] * 3, [85] * 3, [170] * 3, [255] * 3]
    save_array(tmp_path / "16.png", [0, 21845, 43690, 65535], np.uint16)
    save_array(tmp_path / "16.tiff", [0, 21845, 43690, 65535], np.uint16)
    save_array(tmp_path / "16.jp2", [0, 21845, 43690, 65535], np.uint16, irreversible=False)
    save_array(tmp_path / "16.pgm", [0, 21845, 43690, 65535], np.uint16)
    save_array(tmp_path / "32.tiff", [0, 21845, 43690, 65535], np.int32)
    save_array(tmp_path / "float.tiff", [-1e-7, 1 / 3, 2 / 3, 1 + 1e-6], np.float32)
    for path in tmp_path.iterdir():
        assert pixels_of(load_image(path)) == thirds, path.name
    save_array(tmp_path / "black.png", [0, 0], np.uint16)
    assert pixels_of(load_image(tmp_path / "black.png")) == [[0] * 3] * 2


def test_kinds_of_tiff_that_pillow_reads_wrongly(tmp_path: Path) -> None:
    """K26: 16 bits that count from white, colour of 16 bits, signed bytes, and floating point colour."""
    deep = struct.pack("<2H", 0, 65535)
    path = tiff(tmp_path / "white_is_zero.tiff", deep, bits=16, channels=1, sample_format=1, photometric=0)
    assert pixels_of(load_image(path)) == [[255] * 3, [0] * 3]
    colour = struct.pack("<6H", 65535, 0, 0, 0, 0, 32896)
    path = tiff(tmp_path / "colour.tiff", colour, bits=16, channels=3, sample_format=1, photometric=2)
    assert pixels_of(load_image(path)) == [[255, 0, 0], [0, 0, 128]]
    path = tiff(tmp_path / "signed.tiff", b"\xff\1", bits=8, channels=1, sample_format=2, photometric=1)
    with pytest.raises(UserError, match="signed numbers of 8 bits"):
        load_image(path)
    floats = struct.pack("<6f", *[0.5] * 6)
    path = tiff(tmp_path / "float.tiff", floats, bits=32, channels=3, sample_format=3, photometric=2)
    with pytest.raises(UserError, match=r"a TIFF of a kind that is not read .*save it as an 8-bit PNG"):
        load_image(path)


def test_a_transparent_grey_of_16_bits(tmp_path: Path) -> None:
    """K26: a PNG may name one grey transparent."""
    save_array(tmp_path / "key.png", [0, 30000, 65535], np.uint16, transparency=0)
    assert pixels_of(load_image(tmp_path / "key.png")) == [[255] * 3, [117] * 3, [255] * 3]


def test_strips_are_seamless(tmp_path: Path) -> None:
    """K28: a picture of more than one strip is, bit for bit, what it is in one go."""
    values = np.random.default_rng(3).integers(0, 256, (1400, 1600, 4), dtype=np.uint8)
    background = Image.new("RGBA", (1600, 1400), (255, 255, 255, 255))
    whole = Image.alpha_composite(background, Image.fromarray(values)).convert("RGB")
    assert to_rgb(Image.fromarray(values)).tobytes() == whole.tobytes()


@pytest.mark.parametrize(("mode", "most"), [("P", 8), pytest.param("RGBA", 13, marks=pytest.mark.slow)])
def test_memory_for_large_pictures_does_not_grow_with_the_threads(tmp_path: Path, mode: str, most: int) -> None:
    """K28: two transparent pictures of 13,000 x 13,000 in 16 threads take what one takes: 5 or 8 bytes a pixel."""
    image = Image.new(mode, (13_000, 13_000), 7 if mode == "P" else (10, 20, 30, 128))
    if mode == "P":
        image.putpalette([10, 20, 30] * 8)
    image.save(tmp_path / "0.png", compress_level=1, transparency=6 if mode == "P" else None)
    del image
    (tmp_path / "1.png").hardlink_to(tmp_path / "0.png")
    process = subprocess.run(
        [sys.executable, "-c", PEAK_OF_OPENING, *map(str, tmp_path.glob("*.png"))], capture_output=True, check=True
    )
    assert float(process.stdout) / 13_000**2 < most


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    """I3: colours come from the palette, the transparent one is white."""
    image = Image.new("P", (2, 1))
    image.putpalette([*GREEN, *RED])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert pixels_of(load_image(tmp_path / "palette.png")) == [[255, 255, 255], [255, 0, 0]]


def test_a_transparent_colour_without_alpha(tmp_path: Path) -> None:
    """I3: a PNG may name one colour of an RGB picture transparent."""
    two_pixels("RGB", GREEN, RED).save(tmp_path / "key.png", transparency=GREEN)
    assert pixels_of(load_image(tmp_path / "key.png")) == [[255, 255, 255], [255, 0, 0]]


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    """I3: a GIF and a WebP of several frames."""
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    for name in ("a.gif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert pixels_of(load_image(tmp_path / name)) == [[255, 0, 0]] * 64


@pytest.mark.parametrize(("orientation", "expected"), [(1, [RED, BLUE]), (3, [BLUE, RED]), (2, [BLUE, RED])])
def test_the_orientation_of_the_camera_is_applied(
    tmp_path: Path, orientation: int, expected: list[tuple[int, int, int]]
) -> None:
    """I3: a photograph taken upside down stands upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_pixels("RGB", RED, BLUE).save(tmp_path / "photo.png", exif=exif)
    assert pixels_of(load_image(tmp_path / "photo.png")) == [list(color) for color in expected]


def test_a_photograph_on_its_side_is_turned(tmp_path: Path) -> None:
    """I3: width and height change places."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), RED).save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(tmp_path / "photo.jpg").size == (20, 30)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that says it has that size, and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def half_of_a_jpeg() -> bytes:
    """Return the first half of a photograph."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713\nsize 132735\n"


def fits() -> bytes:
    """Return a FITS file of two numbers of 16 bits, which are signed there and unsigned for Pillow."""
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    2", "NAXIS2  =                    1", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + struct.pack(">2h", -1000, 2000).ljust(2880)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.jpg": (lambda path: None, "there is no such file"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "the file is empty (0 bytes)"),
    "half.jpg": (lambda path: path.write_bytes(half_of_a_jpeg()), "the file is damaged or cut off: "),
    "page.jpg": (
        lambda path: path.write_text("\n<!DOCTYPE html><html>"),
        "this is a text (HTML, XML or SVG)",
    ),
    "drawing.png": (lambda path: path.write_text("<svg></svg>"), "this is a text (HTML, XML or SVG)"),
    "folder.jpg": (lambda path: path.mkdir(), "this is a folder, not an image"),
    "words.jpg": (lambda path: path.write_text("not a picture"), "this is no image of a known format"),
    "bomb.png": (lambda path: path.write_bytes(png_header(20_000, 20_000)), "the image has too many pixels: "),
    "loop.jpg": (lambda path: path.symlink_to(path), "the file cannot be read: Too many levels of symbolic links"),
    "photo.heic": (
        lambda path: path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        "this is a HEIC image or a video",
    ),
    "pointer.jpg": (
        lambda path: path.write_text(LFS),
        "this is a pointer of Git LFS, not the image: run git lfs pull",
    ),
    "sky.fits": (lambda path: path.write_bytes(fits()), "this is a FITS file, whose numbers have no fixed range"),
    "iVBORw0KGgoAAAANSUhEUgAA": (lambda path: None, "this is no path: an image is read from a file, not from text"),
    "/9j/4AAQSkZJRgABAQAAAQABAAD" + "A" * 3000: (lambda path: None, "this is no path: an image is read from a file"),
    "n" * 300: (lambda path: None, "the file cannot be read: File name too long"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_apart(tmp_path: Path, name: str) -> None:
    """I3: what is wrong is said, never as a traceback."""
    make, expected = BAD[name]
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_image(tmp_path / name)
    (problem,) = caught.value.problems
    assert problem.where == shorten(str(tmp_path / name))
    assert len(str(problem)) < 600
    assert problem.what.startswith(expected)
    assert problem.fix == "replace the file, correct the path, or set on_bad_image: skip"


@pytest.fixture
def without_privileges() -> Iterator[None]:
    """Give up a superuser's rights, which no permission bits would stop, for the time of a test."""
    is_superuser = os.geteuid() == 0
    if is_superuser:
        os.seteuid(65534)
    yield
    if is_superuser:
        os.seteuid(0)


def test_a_file_that_may_not_be_read(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """I3: said as such."""
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    path.chmod(0)
    request.getfixturevalue("without_privileges")
    assert find_bad_images([str(path)], progress=False) == {str(path): "the file may not be read (permission denied)"}


def test_paths_are_relative_to_the_folder_of_the_data_file() -> None:
    """I3: from whichever folder the run is started; an absolute path stays."""
    assert resolve("图 a/b.png", Path("/data")) == "/data/图 a/b.png"
    assert resolve("/other/b.png", Path("/data")) == "/other/b.png"
