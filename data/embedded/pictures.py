"""Pictures that `glm-edge-v-nano` and its demonstration are about: coloured shapes, and scenes with house and trees.

A `Picture` is a description; `draw` makes pixels of it and `label_cells` says what each image token covers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 210),
    "yellow": (240, 210, 40),
    "purple": (130, 50, 160),
    "orange": (245, 135, 25),
    "black": (25, 25, 25),
    "pink": (245, 130, 175),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SCENE_ITEMS = ("house", "tree", "sun", "moon")
BACKGROUNDS: tuple[RGB, ...] = ((255, 255, 255), (225, 225, 225), (250, 242, 220), (215, 230, 245), (222, 240, 222))
SKIES: dict[str, RGB] = {"day": (150, 205, 245), "night": (30, 35, 80)}
GROUND: dict[str, RGB] = {"day": (110, 180, 90), "night": (45, 85, 50)}
HORIZON = 0.58  # of the height; the ground begins there

CELLS_PER_SIDE = 24  # an image of 672 pixels becomes 24 x 24 vectors
CELL_CLASSES = ("plain", "day", "night", "ground", *SHAPES, *SCENE_ITEMS)
_PIXELS_PER_CELL = 7


@dataclass(frozen=True)
class Item:
    """One thing of a picture.

    Attributes:
        kind: one of SHAPES or SCENE_ITEMS.
        colour: one of COLOURS; of a tree, sun or moon the nearest of them.
        x, y: its centre, from 0 at the left and top to 1.
        size: its width, of the picture's width 1.
    """

    kind: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def zone(self) -> int:
        """The ninth of the picture that holds the centre: row by row from 0, top left, to 8, bottom right."""
        return 3 * min(2, int(3 * self.y)) + min(2, int(3 * self.x))


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        items: without order; none covers another's centre.
        background: the paper of a picture of shapes; None for a scene.
        time: `day` or `night` of a scene; empty otherwise.
        tint: how far every colour is shifted, per channel.
    """

    items: tuple[Item, ...]
    background: RGB | None
    time: str = ""
    tint: RGB = (0, 0, 0)


def random_shapes(rng: Random, count: int) -> Picture:
    """Return `count` shapes, at most 9, one in a ninth each."""
    items = tuple(
        Item(
            kind=rng.choice(SHAPES),
            colour=rng.choice(tuple(COLOURS)),
            x=(zone % 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03),
            y=(zone // 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03),
            size=rng.uniform(0.11, 0.15),
        )
        for zone in rng.sample(range(9), count)
    )
    return Picture(items, background=rng.choice(BACKGROUNDS), tint=_random_tint(rng))


def random_crowd(rng: Random) -> Picture:
    """Return a picture full of shapes, about 28 on a grid of 6 by 6: the more shapes, the more to learn from."""
    items = tuple(
        Item(
            kind=rng.choice(SHAPES),
            colour=rng.choice(tuple(COLOURS)),
            x=(place % 6 + 0.5) / 6 + rng.uniform(-0.015, 0.015),
            y=(place // 6 + 0.5) / 6 + rng.uniform(-0.015, 0.015),
            size=rng.uniform(0.11, 0.15),
        )
        for place in range(36)
        if rng.random() < 0.8
    )
    return Picture(items, background=rng.choice(BACKGROUNDS), tint=_random_tint(rng))


def random_scene(rng: Random) -> Picture:
    """Return a house and one to three trees on the ground, and the sun or the moon above."""
    time = rng.choice(("day", "night"))
    body = Item(
        kind="sun" if time == "day" else "moon",
        colour="yellow",
        x=rng.choice((1, 3, 5)) / 6 + rng.uniform(-0.03, 0.03),
        y=rng.uniform(0.15, 0.2),
        size=rng.uniform(0.18, 0.24),
    )
    places = rng.sample(range(4), rng.randint(2, 4))
    on_ground = tuple(
        Item(
            kind="house" if index == 0 else "tree",
            colour=rng.choice(tuple(COLOURS)) if index == 0 else "green",
            x=(place + 0.5) / 4 + rng.uniform(-0.015, 0.015),
            y=rng.uniform(0.7, 0.78),
            size=rng.uniform(0.18, 0.22),
        )
        for index, place in enumerate(places)
    )
    return Picture((body, *on_ground), background=None, time=time, tint=_random_tint(rng))


def _random_tint(rng: Random) -> RGB:
    return rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(-12, 12)


def draw(picture: Picture, side: int) -> Image.Image:
    """Return the picture as `side` x `side` pixels, mode RGB, with smooth edges."""
    large = 2 * side
    sky = picture.background or SKIES[picture.time]
    image = Image.new("RGB", (large, large), _tinted(sky, picture.tint))
    pen = ImageDraw.Draw(image)
    if picture.time:
        ground = _tinted(GROUND[picture.time], picture.tint)
        pen.rectangle((0, round(HORIZON * large), large, large), fill=ground)
    for item in picture.items:
        _draw_item(pen, item, large, _tinted(COLOURS[item.colour], picture.tint))
    return image.reduce(2)


def _tinted(colour: RGB, tint: RGB) -> RGB:
    red, green, blue = (min(255, max(0, value + shift)) for value, shift in zip(colour, tint, strict=True))
    return red, green, blue


def label_cells(picture: Picture) -> NDArray[np.int64]:
    """Return what each of the 24 x 24 cells shows, `(576, 4)`, row by row.

    The columns: index in CELL_CLASSES; index in COLOURS and zone (both -100 where there is no item); 1 in the cell of
    an item's centre, else 0.
    """
    side = CELLS_PER_SIDE * _PIXELS_PER_CELL
    canvas = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    for index, item in enumerate(picture.items):
        _draw_item(pen, item, side, index + 1, mark_only=True)
    middle = _PIXELS_PER_CELL // 2
    owners = np.asarray(canvas)[middle::_PIXELS_PER_CELL, middle::_PIXELS_PER_CELL]
    labels = np.full((CELLS_PER_SIDE, CELLS_PER_SIDE, 4), -100, dtype=np.int64)
    labels[:, :, 0] = CELL_CLASSES.index(picture.time or "plain")
    labels[:, :, 3] = 0
    if picture.time:
        labels[round(HORIZON * CELLS_PER_SIDE) :, :, 0] = CELL_CLASSES.index("ground")
    for index, item in enumerate(picture.items):
        owned = owners == index + 1
        labels[owned, 0] = CELL_CLASSES.index(item.kind)
        labels[owned, 1] = tuple(COLOURS).index(item.colour)
        labels[owned, 2] = item.zone
        labels[int(item.y * CELLS_PER_SIDE), int(item.x * CELLS_PER_SIDE), 3] = 1
    return labels.reshape(-1, 4)


def cover_of_cells(picture: Picture, points: int) -> NDArray[np.float32]:
    """Return 1 where an item is and 0 elsewhere, `points` x `points` samples for each of the 24 x 24 cells.

    The shape is `(24 * points, 24 * points)`.
    """
    side = CELLS_PER_SIDE * points
    canvas = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    for item in picture.items:
        _draw_item(pen, item, side, 1, mark_only=True)
    return np.asarray(canvas, dtype=np.float32)


# ---- one item -------------------------------------------------------------------------------------------------------


def _draw_item(pen: ImageDraw.ImageDraw, item: Item, side: int, fill: RGB | int, mark_only: bool = False) -> None:
    """Draw an item on a canvas of `side` pixels; `mark_only` leaves out what has other colours than `fill`."""
    x, y, radius = item.x * side, item.y * side, item.size * side / 2

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return x + left * radius, y + top * radius, x + right * radius, y + bottom * radius

    def points(*pairs: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + across * radius, y + down * radius) for across, down in pairs]

    if item.kind in {"circle", "moon"}:
        pen.ellipse(box(-1, -1, 1, 1), fill=_moonlight(item, fill, mark_only))
    elif item.kind == "square":
        pen.rectangle(box(-0.9, -0.9, 0.9, 0.9), fill=fill)
    elif item.kind == "triangle":
        pen.polygon(points((0, -1), (1, 0.85), (-1, 0.85)), fill=fill)
    elif item.kind == "cross":
        pen.rectangle(box(-1, -0.33, 1, 0.33), fill=fill)
        pen.rectangle(box(-0.33, -1, 0.33, 1), fill=fill)
    elif item.kind == "heart":
        pen.ellipse(box(-1, -0.9, 0.02, 0.12), fill=fill)
        pen.ellipse(box(-0.02, -0.9, 1, 0.12), fill=fill)
        pen.polygon(points((-0.94, -0.15), (0.94, -0.15), (0, 1)), fill=fill)
    elif item.kind in {"star", "sun"}:
        tips, inner = (5, 0.42) if item.kind == "star" else (10, 0.72)
        pen.polygon(points(*_star(tips, inner)), fill=fill)
    elif item.kind == "house":
        pen.rectangle(box(-0.85, -0.2, 0.85, 1), fill=fill)
        pen.polygon(points((-1, -0.2), (1, -0.2), (0, -1)), fill=fill if mark_only else (120, 70, 50))
        if not mark_only:
            pen.rectangle(box(-0.2, 0.4, 0.2, 1), fill=(235, 225, 200))
    elif item.kind == "tree":
        pen.rectangle(box(-0.18, 0.3, 0.18, 1), fill=fill if mark_only else (110, 75, 45))
        pen.ellipse(box(-0.8, -1, 0.8, 0.5), fill=fill if mark_only else (30, 110, 50))


def _moonlight(item: Item, fill: RGB | int, mark_only: bool) -> RGB | int:
    return fill if mark_only or item.kind == "circle" else (240, 240, 215)


def _star(tips: int, inner: float) -> list[tuple[float, float]]:
    angles = [math.pi * index / tips - math.pi / 2 for index in range(2 * tips)]
    return [
        (math.cos(angle) * (inner if index % 2 else 1.0), math.sin(angle) * (inner if index % 2 else 1.0))
        for index, angle in enumerate(angles)
    ]
