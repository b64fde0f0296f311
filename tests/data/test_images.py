"""Image files to pixels: every colour mode, every kind of bad file, and the preprocessing against plain Pillow."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from glm_edge_ft.data.images import (
    find_bad_images,
    fit,
    fitted_shape,
    load_image,
    preprocess,
    raise_bad_images,
    resolve,
    to_rgb,
)
from glm_edge_ft.data.pixels import pixel_scale
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.loading import ModelLocation, load_image_processor

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PREPROCESSOR = {
    "image_processor_type": "MllamaImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_tiles": 1,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 672, "width": 672},
}


def image_processor_of(folder: Path, **changes: Any) -> Any:
    """Return the released image processor, read from a folder as a checkpoint's is."""
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **changes}), encoding="utf-8")
    return load_image_processor(ModelLocation(str(folder), str(folder), is_local=True))


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
        (two_pixels("I", 257 * 100, 70000), [[100, 100, 100], [255, 255, 255]]),
        (two_pixels("F", 0.2, 1.0), [[51, 51, 51], [255, 255, 255]]),
        (two_pixels("F", float("nan"), 2.0), [[0, 0, 0], [255, 255, 255]]),
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


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.jpg": (lambda path: None, "there is no such file"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "the file is empty (0 bytes)"),
    "half.jpg": (lambda path: path.write_bytes(half_of_a_jpeg()), "the file is damaged or cut off: "),
    "page.jpg": (
        lambda path: path.write_text("\n<!DOCTYPE html><html>"),
        "this is a text of markup (HTML, XML or SVG)",
    ),
    "drawing.png": (lambda path: path.write_text("<svg></svg>"), "this is a text of markup (HTML, XML or SVG)"),
    "folder.jpg": (lambda path: path.mkdir(), "this is a folder, not a picture"),
    "words.jpg": (lambda path: path.write_text("not a picture"), "this is no picture of a known format"),
    "bomb.png": (lambda path: path.write_bytes(png_header(20_000, 20_000)), "the picture has too many pixels: "),
    "loop.jpg": (lambda path: path.symlink_to(path), "the file cannot be read: Too many levels of symbolic links"),
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
    assert problem.where == str(tmp_path / name)
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


def check(places: dict[str, list[str]]) -> None:
    """Open every image and raise for the rows with bad ones."""
    raise_bad_images(places, find_bad_images(places, progress=False))


def test_all_rows_with_bad_images_are_listed_by_place(tmp_path: Path) -> None:
    """I3: each row that uses a bad image, good ones in between, names with spaces and Chinese characters."""
    good, bad = tmp_path / "好 图 a.png", tmp_path / "坏 图.png"
    Image.new("RGB", (2, 2)).save(good)
    bad.write_bytes(b"")
    places = {str(good): ["train.jsonl:1"], str(bad): ["train.jsonl:2", "dev.jsonl:7"], "/no.png": ["train.jsonl:3"]}
    with pytest.raises(UserError) as caught:
        check(places)
    assert [str(problem).split("\n")[0] for problem in caught.value.problems] == [
        f"train.jsonl:2: image {bad}: the file is empty (0 bytes)",
        f"dev.jsonl:7: image {bad}: the file is empty (0 bytes)",
        "train.jsonl:3: image /no.png: there is no such file",
    ]


def test_twenty_bad_rows_are_listed_and_the_others_counted() -> None:
    """I3: a data set whose folder is missing gives no thousand lines."""
    places = {f"/none/{number}.png": [f"train.jsonl:{number}"] for number in range(33)}
    with pytest.raises(UserError) as caught:
        check(places)
    assert len(caught.value.problems) == 21
    assert str(caught.value.problems[-1]) == "...: 13 more rows have a bad image"


def test_good_images_pass(tmp_path: Path) -> None:
    """I3: nothing is raised, however many rows point to one image."""
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    check({str(tmp_path / "a.png"): [f"train.jsonl:{line}" for line in range(3000)]})


def test_paths_are_relative_to_the_folder_of_the_data_file() -> None:
    """I3: from whichever folder the run is started; an absolute path stays."""
    assert resolve("图 a/b.png", Path("/data")) == "/data/图 a/b.png"
    assert resolve("/other/b.png", Path("/data")) == "/other/b.png"


def by_recipe(image: Image.Image) -> NDArray[np.float64]:
    """Return the pixels by the released recipe in plain Pillow and numpy, (3, 672, 672)."""
    width, height = image.size
    size = (672, max(1, height * 672 // width)) if width >= height else (max(1, width * 672 // height), 672)
    canvas = np.zeros((672, 672, 3))
    canvas[: size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    return (canvas.transpose(2, 0, 1) / 255 - 0.5) / 0.5


@pytest.mark.parametrize(
    "size", [(672, 672), (100, 37), (37, 100), (1344, 700), (1000, 999), (5, 5), (1, 1), (1, 900), (900, 1), (3, 2)]
)
def test_preprocessing_equals_the_recipe(tmp_path: Path, size: tuple[int, int]) -> None:
    """I3: enlarged and reduced, odd proportions, sides of one pixel: within 1e-6 of plain Pillow."""
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = preprocess(image, image_processor_of(tmp_path))
    assert (pixels.shape, pixels.dtype) == ((3, 672, 672), np.float32)
    assert np.abs(pixels - by_recipe(image)).max() < 1e-6


@pytest.mark.parametrize("size", [(672, 672), (100, 37), (37, 100), (1344, 700), (1, 1), (1, 900), (900, 1)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        {"resample": 2, "do_normalize": False},
        {"size": {"height": 336, "width": 336}, "do_rescale": False},
    ],
    ids=["released", "other mean", "bilinear", "half the side"],
)
def test_bytes_scaled_later_equal_the_processor_bit_by_bit(
    tmp_path: Path, size: tuple[int, int], changes: dict[str, Any]
) -> None:
    """I3: what the loader hands on as bytes becomes the very values that the processor makes, black edges included."""
    noise = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    noise[..., 1] = noise[..., 1] // 2  # channels that differ
    image, processor = Image.fromarray(noise), image_processor_of(tmp_path, **changes)
    scale = pixel_scale(processor, torch.device("cpu"))
    assert scale is not None
    canvas = np.zeros(fitted_shape(processor), dtype=np.uint8)
    fit(image, processor, canvas)
    pixels = scale(torch.from_numpy(canvas).unsqueeze(0))
    assert pixels.dtype == torch.float32
    assert np.array_equal(pixels[0].numpy(), preprocess(image, processor))


@pytest.mark.parametrize("changes", [{"max_image_tiles": 4}, {"image_processor_type": "SiglipImageProcessor"}])
def test_bytes_are_not_handed_on_where_the_processor_does_more(tmp_path: Path, changes: dict[str, Any]) -> None:
    """I4: tiles, and processors of another kind, stay with the processor itself."""
    assert pixel_scale(image_processor_of(tmp_path, **changes), torch.device("cpu")) is None


def test_several_tiles_are_refused(tmp_path: Path) -> None:
    """I4: no part of a picture is left out without a word."""
    processor = image_processor_of(tmp_path, max_image_tiles=4)
    with pytest.raises(UserError, match="cuts an image into 4 tiles, the model takes one"):
        preprocess(Image.new("RGB", (1300, 1300)), processor)


def test_a_folder_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    """I4: a chat model's folder, for instance."""
    (tmp_path / "config.json").write_text('{"model_type": "glm"}', encoding="utf-8")
    with pytest.raises(UserError, match="its image processor cannot be used"):
        load_image_processor(ModelLocation(str(tmp_path), str(tmp_path), is_local=True))
