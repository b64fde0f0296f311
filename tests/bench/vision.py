"""Images per second of the loader, against Pillow alone on as many processes.

    python -m tests.bench.vision [--images 240] [--rounds 5]

Ours: the loader of a real vision run, two processes that read rows, decode photographs, fit them into 672 x 672, make
batches and hand them to this process. What it then costs to scale the bytes where the model computes is measured apart.
Pillow: two processes that decode and resize
the same files to 672 x 672, give nothing back and know of no batch. The first quarter of each pass is not counted.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tests.bench.images import CONFIG, write_data
from tests.bench.measure import in_turn, median_ratio
from tests.bench.result import Ratio, Result, Table, installed, keep

PROCESSES = 2
BATCH_SIZE = 4
SIZES = ((640, 480), (1600, 1200))


@dataclass(frozen=True)
class Loader:
    """What a real run makes its batches with.

    Attributes:
        dataset: the encoded rows.
        collate, scale: `VisionCollator` and `PixelScale`.
    """

    dataset: Any
    collate: Any
    scale: Any


def prepare_loader(folder: Path, model: str) -> Loader:
    """Do what a run does up to its loader."""
    import torch

    from glm_edge_ft.data.pixels import pixel_scale
    from glm_edge_ft.preflight import RunRequest, check_inputs, prepare
    from glm_edge_ft.recipe import build_collator, quiet_libraries

    training = {**CONFIG["training_args"], "output_dir": str(folder / "output"), "max_steps": 1}  # type: ignore[dict-item]
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"training_args": training}), encoding="utf-8")
    quiet_libraries()
    prepared = prepare(check_inputs(RunRequest(folder / "data", model, folder / "run.yaml", takes_images=True)))
    scale = pixel_scale(prepared.image_processor, torch.device("cpu"))
    return Loader(prepared.datasets["train"], build_collator(prepared, "right", scale), scale)


def steady_rate(counts: Iterable[int], total: int) -> float:
    """Return images a second of all that comes after the first quarter of `total`; each count is a batch's images.

    The clock stops with the last of them: what follows is the end of the processes.
    """
    seen, start, before, end = 0, 0.0, 0, 0.0
    for count in counts:
        seen += count
        end = time.perf_counter()
        if not start and seen >= total // 4:
            start, before = end, seen
    return (seen - before) / (end - start)


def our_rate(loader: Loader) -> float:
    """Return images a second of the run's loader."""
    from torch.utils.data import DataLoader

    batches: Any = DataLoader(
        loader.dataset, batch_size=BATCH_SIZE, num_workers=PROCESSES, collate_fn=loader.collate, prefetch_factor=2
    )
    counts = (len(batch["pixel_values"]) for batch in batches)
    return steady_rate(counts, len(loader.dataset))


def scaling_milliseconds(loader: Loader) -> float:
    """Return milliseconds an image that this process needs to make what the model gets of the loader's bytes."""
    batch = loader.collate([loader.dataset[place] for place in range(BATCH_SIZE)])
    loader.scale.complete(batch)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        loader.scale.complete(batch)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds) / BATCH_SIZE


def decode_alone(path: str, size: tuple[int, int]) -> int:
    """Decode and resize an image with Pillow alone."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return 1


def pillow_rate(paths: list[str], size: tuple[int, int]) -> float:
    """Return images a second of Pillow alone."""
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        decode = functools.partial(decode_alone, size=size)
        return steady_rate(pool.imap(decode, paths, chunksize=BATCH_SIZE), len(paths))


def main(
    *,
    images: Annotated[int, typer.Option(help="Photographs of each size.")] = 240,
    rounds: Annotated[int, typer.Option(help="Passes over them, ours and Pillow's in turn.")] = 5,
    model: Annotated[str, typer.Option(help="A vision model.")] = "glm-edge-v-nano",
) -> None:
    """Measure both sizes and keep the result."""
    ratios: list[Ratio] = []
    rows: list[tuple[str | float, ...]] = []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as work:
            os.environ["GLM_EDGE_FT_CACHE"] = f"{work}/cache"
            write_data(Path(work) / "data", images, images, (width, height))
            loader = prepare_loader(Path(work), model)
            paths = [str(path) for path in sorted((Path(work) / "data").glob("*.jpg"))]
            ours, pillow, fitted = in_turn(
                rounds,
                functools.partial(our_rate, loader),
                functools.partial(pillow_rate, paths, (672, 672)),
                functools.partial(pillow_rate, paths, (672, 672 * height // width)),
            )
            scaling = scaling_milliseconds(loader)
        what = f"photographs of {width} x {height} a second, our loader / Pillow alone, {PROCESSES} processes each"
        ratios.append(Ratio(what, median_ratio(ours, pillow), 1.0))
        rows.append((f"{width} x {height}", *(statistics.median(rates) for rates in (ours, pillow, fitted)), scaling))
    keep(
        Result(
            name="vision",
            title="Loading images",
            command=f"python -m tests.bench.vision --images {images} --rounds {rounds}",
            ratios=ratios,
            tables=[
                Table(
                    (
                        "JPEG files",
                        "ours, images/s",
                        "Pillow to 672 x 672",
                        "Pillow to our proportions",
                        "scaling on this CPU, ms an image",
                    ),
                    rows,
                )
            ],
            notes=[
                f"Each of the {rounds} rounds measures all, in turn; the ratio is the median over the rounds. The "
                "first quarter of a pass, with the start of the processes, is not counted.",
                "Ours reads the encoded rows, decodes, turns as EXIF says, fits into 672 x 672 in the picture's own "
                "proportions, makes batches and hands them to this process as bytes. Scaled where the model "
                "computes, they are the values that the checkpoint's image processor makes, bit by bit; that is not in "
                "the figure: beside a step on a GPU it is nothing, on a CPU the last column says what it is.",
                "Pillow decodes and resizes to the full 672 x 672, which is a third more pixels than a picture of "
                "4 to 3 fills, and gives nothing back; the third figure is without that third.",
                "Where the difference goes: fresh pages of shared memory for each batch, the receiving process, and "
                "the way of the bytes out of Pillow.",
            ],
            versions=installed("pillow"),
        )
    )


if __name__ == "__main__":
    typer.run(main)
