"""First stage of training `glm-edge-v-nano`: tower and adapter learn what each cell of a picture shows.

A throwaway linear head reads the adapter's 576 vectors and tells for each cell its class, the colour and the zone of
the item that it belongs to, and whether it is an item's centre. So the vectors carry what is where, which the language
part would find out far more slowly from texts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from data.embedded.picture_exchanges import CHINESE, ENGLISH
from data.embedded.pictures import (
    CELL_CLASSES,
    CELLS_PER_SIDE,
    COLOURS,
    Picture,
    cover_of_cells,
    draw,
    label_cells,
    random_crowd,
    random_scene,
    random_shapes,
)
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM

ZONES = 9
OUTLINE_SCALE = np.array([2.0, 8.0, 9.0])  # brings the waves to about the same size
OUTLINE_WEIGHT = 2.0
SIDES = (128, 144, 168, 192, 224)  # pixels of a stored picture; all are enlarged to 672
EMPTY_CLASSES = 4  # the first of CELL_CLASSES; three cells of four are empty
PIXELS_PER_CELL = 28
VECTOR_SIZE = 0.1  # root mean square of a vector: that of the sum of three embeddings
LAST_MATRIX = "dense_4h_to_h.weight"
EMPTY_WORDS = {"plain": "空", "day": "白天 day", "night": "晚上 night", "ground": "地"}
POSITION_RATES = tuple(2 * math.pi / (8 * 1.5**index) for index in range(8))  # radians a patch
WAVES = 3  # of each direction in a patch
IMAGE_SIDE = CELLS_PER_SIDE * PIXELS_PER_CELL
HEAD_NAMES = ("class", "colour", "zone", "centre")
HEAD_PARTS = (len(CELL_CLASSES), len(COLOURS), ZONES, 2)


@dataclass(frozen=True)
class TowerStage:
    """Steps on windows of one size.

    Attributes:
        window: cells a side; attention costs the fourth power of it.
        steps: optimizer steps.
        batch_size: windows in a step.
        peak: highest learning rate.
        crowded: share of pictures full of shapes.
    """

    window: int
    steps: int
    batch_size: int
    peak: float
    crowded: float = 0.0


def random_picture(rng: Random) -> Picture:
    """Return a picture as the training has them: three of four with one to six shapes, the others scenes."""
    return random_scene(rng) if rng.random() < 0.25 else random_shapes(rng, rng.randint(1, 6))


def picture_pixels(picture: Picture, side: int, window: tuple[int, int, int] = (0, 0, CELLS_PER_SIDE)) -> torch.Tensor:
    """Return the pixels as the checkpoint's image processor makes them of a square picture, (3, size, size) float32.

    Args:
        picture: what to draw.
        side: pixels a side of the stored picture, which is enlarged to 672.
        window: what part of the enlarged picture, in cells: row, column, and cells a side; the default is all of it.
    """
    row, column, cells = (number * PIXELS_PER_CELL for number in window)
    scale = side / IMAGE_SIDE
    box = (column * scale, row * scale, (column + cells) * scale, (row + cells) * scale)
    part = draw(picture, side).resize((cells, cells), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.asarray(part, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)


@torch.no_grad()
def seed_tower(model: GlmEdgeVForCausalLM) -> None:
    """Let every patch see edges and look at its neighbourhood before anything is learned.

    Half of the width holds the patch's cosine waves, the other half sines and cosines of row and column. The four heads
    start by looking at what lies above, below, left and right, in the first layer at the next patch and then at some
    around the third; to find that by training on pictures takes thousands of steps.
    """
    tower: Any = model.model.vision.vit.model.vision_model
    side, width = model.config.patches_per_side, tower.config.hidden_size
    half = width // 2
    places = torch.arange(side, dtype=torch.float32)
    codes = torch.cat([wave for rate in POSITION_RATES for wave in _code(places * rate)], dim=1)
    rows = codes[:, None, :].expand(side, side, -1)
    columns = codes[None, :, :].expand(side, side, -1)
    embeddings = tower.embeddings
    embeddings.position_embedding.weight[:, :half] = 0.0
    embeddings.position_embedding.weight[:, half:] = torch.cat([rows, columns], dim=2).reshape(side * side, half)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.weight[: 3 * WAVES * WAVES] = _cosine_filters(tower.config.patch_size)
    embeddings.patch_embedding.bias.zero_()
    for number, layer in enumerate(tower.encoder.layers):
        distance, sharpness = (1, 3.6) if number == 0 else (3, 1.4)
        for head, (down, right) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            _look_towards(layer.self_attn, head, (down * distance, right * distance), sharpness)


def _code(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angles.sin()[:, None], angles.cos()[:, None]


def _look_towards(attention: Any, head: int, offset: tuple[int, int], sharpness: float) -> None:
    """Let one head of 16 dimensions look at the patch that lies `offset` (rows down, columns right) from its own.

    Its keys are the sines and cosines of every other rate; its queries are the same, moved on by the offset.
    """
    width = attention.head_dim
    keys, queries = (
        projection.weight[head * width : (head + 1) * width] for projection in (attention.k_proj, attention.q_proj)
    )
    keys.mul_(0.3)
    queries.mul_(0.3)
    half = attention.embed_dim // 2
    place = 0
    for axis in (0, 1):
        for index in range(0, len(POSITION_RATES), 2):
            sine = half + axis * half // 2 + 2 * index
            cosine = sine + 1
            turn = POSITION_RATES[index] * offset[axis]
            keys[place, sine] += sharpness
            keys[place + 1, cosine] += sharpness
            queries[place, sine] += sharpness * math.cos(turn)
            queries[place, cosine] += sharpness * math.sin(turn)
            queries[place + 1, sine] -= sharpness * math.sin(turn)
            queries[place + 1, cosine] += sharpness * math.cos(turn)
            place += 2


def _cosine_filters(size: int) -> torch.Tensor:
    """Return `(27, 3, size, size)`: for each colour the lowest cosine waves across and down a patch (as in JPEG).

    They tell mean colour, and edges with their direction, which random filters hardly do.
    """
    points = (torch.arange(size, dtype=torch.float32) + 0.5) * math.pi / size
    waves = torch.stack([(number * points).cos() for number in range(WAVES)])
    filters = torch.zeros(3, WAVES, WAVES, 3, size, size)
    for colour in range(3):
        filters[colour, :, :, colour] = 2 * waves[:, None, :, None] * waves[None, :, None, :] / size**2
    filters[:, 0, 0] /= 2
    return 2 * filters.flatten(0, 2)


@torch.no_grad()
def widen_adapter(model: GlmEdgeVForCausalLM) -> None:
    """Start the adapter's matrices at one over the square root of their inputs, the last one at the size of vectors.

    The initializer range of the released models, 0.02, suits wide layers; here its product of small numbers would keep
    the vectors near 0 for hundreds of steps.
    """
    for name, weight in model.model.vision.adapter.named_parameters():
        if weight.dim() in {2, 4}:
            size = VECTOR_SIZE if name.endswith(LAST_MATRIX) else 1.0
            weight.normal_(0.0, size * weight[0].numel() ** -0.5)


@torch.no_grad()
def word_tables(model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, ...]:
    """Return the words for each class, colour and zone as vectors of the language part, `(names, hidden)` each.

    A vector is the mean of the input embeddings of the name's tokens, Chinese and English, less the mean of its table,
    brought to size 1.
    """
    classes = [
        EMPTY_WORDS[name] if name in EMPTY_WORDS else CHINESE.kinds[name] + " " + ENGLISH.kinds[name]
        for name in CELL_CLASSES
    ]
    colours = [f"{CHINESE.colours[name]} {name}" for name in COLOURS]
    zones = [f"{first} {second}" for first, second in zip(CHINESE.zones, ENGLISH.zones, strict=True)]
    tables = []
    for names in (classes, colours, zones):
        ids = [tokenizer.encode(name, add_special_tokens=False) for name in names]
        rows = torch.stack([model.model.embed_tokens.weight[of_name].mean(0) for of_name in ids])
        rows = rows - rows.mean(0)  # what all names share, such as the character for colour, tells nothing
        tables.append(rows / rows.pow(2).mean(1, keepdim=True).sqrt())
    return tuple(tables)


def word_loss(vectors: torch.Tensor, labels: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return how far the vectors are from the sum of the words of what their cells show.

    So the language part, which knows how to find and repeat words, can read a picture from the start.

    Args:
        vectors: `(images, cells, hidden)`, brought to size 1.
        labels: `(images, cells, 4)` of `label_cells`.
        tables: as `word_tables` returns them.
    """
    of_class, colour, zone, _ = labels.flatten(0, 1).unbind(1)
    on_item = colour >= 0
    words = tables[0][of_class]
    words[on_item] = (words[on_item] + tables[1][colour[on_item]] + tables[2][zone[on_item]]) / 3**0.5
    distances = (vectors.flatten(0, 1) - words).pow(2).mean(1)
    weights = torch.where(on_item, 1.0, 0.2)
    return (distances * weights).sum() / weights.sum()


def dense_loss(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Return the loss of the head and how often class, colour, zone and centre are right on the cells of items.

    Args:
        scores: `(images, 576, sum of HEAD_PARTS)`.
        labels: `(images, 576, 4)` of `label_cells`.
    """
    parts = scores.flatten(0, 1).split(HEAD_PARTS, dim=1)
    targets = labels.flatten(0, 1).unbind(1)
    of_class = torch.ones(HEAD_PARTS[0])
    of_class[:EMPTY_CLASSES] = 0.2
    weights = (of_class, None, None, torch.tensor([1.0, 8.0]))
    losses = [
        cross_entropy(part, target, weight=weight) for part, target, weight in zip(parts, targets, weights, strict=True)
    ]
    on_item = targets[1] >= 0
    rights = [
        float((part.argmax(1) == target)[on_item].float().mean()) for part, target in zip(parts, targets, strict=True)
    ]
    return torch.stack(losses).sum(), rights


def window_vectors(
    model: GlmEdgeVForCausalLM, pixels: torch.Tensor, corners: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the tower and the adapter make of square windows out of whole images.

    The first are the states after the tower's first layer, `(images, patches, tower_hidden)`, the second the adapter's
    vectors, `(images, cells, hidden)`.

    Args:
        pixels: `(images, 3, window, window)`.
        corners: row and column of each window's first patch in its image, `(images, 2)`.
    """
    tower: Any = model.model.vision.vit.model.vision_model
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    span = torch.arange(pixels.shape[-1] // tower.config.patch_size)
    rows, columns = corners[:, :1] + span, corners[:, 1:] + span
    places = (rows[:, :, None] * model.config.patches_per_side + columns[:, None, :]).flatten(1)
    first = states = tower.encoder.layers[0](patches + tower.embeddings.position_embedding(places), None)
    for layer in tower.encoder.layers[1:]:
        states = layer(states, None)
    return first, model.model.vision.adapter(tower.post_layernorm(states))[:, 1:-1]


def outlines(picture: Picture) -> NDArray[np.float32]:
    """Return for each of the 48 x 48 patches the lowest cosine waves of what the items cover of it, `(48, 48, 9)`."""
    side, points = 2 * CELLS_PER_SIDE, 7
    cover = cover_of_cells(picture, 2 * points).reshape(side, points, side, points)
    angles = (np.arange(points) + 0.5) * math.pi / points
    waves = np.cos(np.arange(WAVES)[:, None] * angles) * OUTLINE_SCALE[:, None] / points
    return np.einsum("rpcq,ap,bq->rcab", cover, waves, waves).reshape(side, side, -1).astype(np.float32)


@dataclass(frozen=True)
class WindowBatch:
    """Square windows, each out of another picture.

    Attributes:
        pixels: `(images, 3, window, window)`.
        corners: row and column of each window's first patch, `(images, 2)`.
        labels: what its cells show, `(images, cells, 4)`, as `label_cells`.
        outlines: what the items cover of its patches, `(images, patches, 9)`, as `outlines`.
    """

    pixels: torch.Tensor
    corners: torch.Tensor
    labels: torch.Tensor
    outlines: torch.Tensor


def window_batch(rng: Random, count: int, window: int, crowded: float) -> WindowBatch:
    """Return `count` windows of `window` cells a side; the share `crowded` of them out of pictures full of shapes."""
    pixels, corners, labels, covers = [], [], [], []
    for _ in range(count):
        picture = random_crowd(rng) if rng.random() < crowded else random_picture(rng)
        row, column = (rng.randint(0, CELLS_PER_SIDE - window) for _ in range(2))
        cells = label_cells(picture).reshape(CELLS_PER_SIDE, CELLS_PER_SIDE, -1)
        pixels.append(picture_pixels(picture, rng.choice(SIDES), (row, column, window)))
        corners.append((2 * row, 2 * column))
        labels.append(cells[row : row + window, column : column + window].reshape(window * window, -1))
        patches = outlines(picture)[2 * row : 2 * (row + window), 2 * column : 2 * (column + window)]
        covers.append(patches.reshape(4 * window * window, -1))
    return WindowBatch(
        torch.stack(pixels),
        torch.tensor(corners),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(covers)),
    )


def rate_factor(step: int, steps: int, warmup: int = 20) -> float:
    """Return the part of the peak learning rate at a step: it rises, stays, and falls from half way."""
    return min(1.0, (step + 1) / warmup, 0.02 + 2 * (steps - step) / steps)


def _optimizers(model: GlmEdgeVForCausalLM, heads: nn.ModuleDict, peak: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of layers and adapter, and AdamW, at a fifth of its rate, for all else."""
    trained = list(model.model.vision.named_parameters())
    last = [weight for name, weight in trained if name.endswith(LAST_MATRIX)]
    matrices = [
        weight
        for name, weight in trained
        if weight.dim() == 2 and "embedding" not in name and not name.endswith(LAST_MATRIX)
    ]
    others = [weight for name, weight in trained if weight.dim() != 2 or "embedding" in name]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": last, "lr": VECTOR_SIZE * peak}]
    return [
        torch.optim.Muon(groups, lr=peak, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([*others, *heads.parameters()], lr=peak / 5, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_tower(
    model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, stages: Sequence[TowerStage]
) -> None:
    """Train tower and adapter in place, stage after stage; each picture is seen once."""
    seed_tower(model)
    widen_adapter(model)
    rng = Random(seed)
    tower_width = model.model.vision.vit.model.vision_model.config.hidden_size
    heads = nn.ModuleDict(
        {"cells": nn.Linear(model.config.hidden_size, sum(HEAD_PARTS)), "outlines": nn.Linear(tower_width, WAVES**2)}
    )
    tables = word_tables(model, tokenizer)
    trained = [*model.model.vision.parameters(), *heads.parameters()]
    started = time.monotonic()
    for stage in stages:
        optimizers = _optimizers(model, heads, stage.peak)
        factor = partial(rate_factor, steps=stage.steps)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
        seen: list[list[float]] = []
        for step in range(stage.steps):
            batch = window_batch(rng, stage.batch_size, stage.window, stage.crowded)
            first, vectors = window_vectors(model, batch.pixels, batch.corners)
            vectors = vectors / VECTOR_SIZE
            loss, rights = dense_loss(heads["cells"](vectors), batch.labels)
            words = word_loss(vectors, batch.labels, tables)
            outline = nn.functional.mse_loss(heads["outlines"](first), batch.outlines)
            (loss + words + OUTLINE_WEIGHT * outline).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            seen.append([loss.item(), words.item(), outline.item(), *rights])
            if (step + 1) % 50 == 0 or step + 1 == stage.steps:
                means = np.nanmean(seen[-50:], axis=0)
                shown = "  ".join(
                    f"{name} {mean:.3f}"
                    for name, mean in zip(("loss", "words", "outline", *HEAD_NAMES), means, strict=True)
                )
                seconds = time.monotonic() - started
                print(f"tower {stage.window} {step + 1}/{stage.steps}  {shown}  {seconds:.0f} s", flush=True)
