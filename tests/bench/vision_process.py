"""One pass over photographs in a process of its own: `vision_process.py KIND WORK MODEL WIDTH HEIGHT`.

KIND is `ours`, `pillow` (to 672 x 672) or `fitted` (Pillow, to our proportions), where Pillow has a process as ours,
which holds so much that it returns no memory to the system in between; or `fresh`: Pillow in a process that has
imported nothing else, and does.

WORK has `data` with the photographs and the rows that name them, and gets the cache. Prints a line of JSON: the images
of the measured part of the pass, and milliseconds of processor time an image over the whole pass.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.bench.images import CONFIG
from tests.bench.peers.start_line import BEGIN, END, STEP, say, wait

PROCESSES = 2
BATCH_SIZE = 4
SIDE = 672


@dataclass(frozen=True)
class Loader:
    """What a real run makes its batches with.

    Attributes:
        dataset: the encoded rows.
        collate, scale: `VisionCollator` and `PixelNormalizer`.
    """

    dataset: Any
    collate: Any
    scale: Any


def prepare_loader(folder: Path, model: str) -> Loader:
    """Do what a run does up to its loader."""
    import torch

    from glm_edge_ft.checks.environment import quiet_libraries
    from glm_edge_ft.checks.preflight import check_inputs, prepare
    from glm_edge_ft.data.pixels import pixel_normalizer
    from glm_edge_ft.run import RunRequest, build_collator

    training = {**CONFIG["training_args"], "output_dir": str(folder / "output"), "max_steps": 1}  # type: ignore[dict-item]
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"training_args": training}), encoding="utf-8")
    quiet_libraries()
    prepared = prepare(check_inputs(RunRequest(folder / "data", model, config, takes_images=True)))
    scale = pixel_normalizer(prepared.image_processor, torch.device("cpu"))
    return Loader(prepared.datasets["train"], build_collator(prepared, "right", scale), scale)


def measured_part(counts: Iterable[int], total: int) -> int:
    """Take all images, wait behind the first quarter and behind the last; return how many came in between.

    Args:
        counts: the images of each thing that comes; the time until its end is that of processes that end.
        total: of all images.
    """
    seen, before = 0, 0
    for count in counts:
        seen += count
        if not before and seen >= total // 4:
            before = seen
            wait(BEGIN)
        elif before and seen % BATCH_SIZE == 0:
            say(STEP)
    wait(END)
    return seen - before


def our_pass(loader: Loader) -> int:
    """Take the batches of the run's loader."""
    from torch.utils.data import DataLoader

    batches: Any = DataLoader(
        loader.dataset, batch_size=BATCH_SIZE, num_workers=PROCESSES, collate_fn=loader.collate, prefetch_factor=2
    )
    return measured_part((len(batch["pixel_values"]) for batch in batches), len(loader.dataset))


def scaling_milliseconds(loader: Loader) -> float:
    """Return milliseconds an image that this process needs to make what the model gets of the loader's bytes."""
    batch = loader.collate([loader.dataset[place] for place in range(BATCH_SIZE)])
    loader.scale.add_image_features(batch)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        loader.scale.add_image_features(batch)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds) / BATCH_SIZE


def decode_alone(path: str, size: tuple[int, int]) -> int:
    """Decode and resize an image with Pillow alone."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return 1


def pillow_pass(paths: list[str], size: tuple[int, int]) -> int:
    """Decode and resize with Pillow alone."""
    pool = multiprocessing.get_context("fork").Pool(PROCESSES)
    decode = functools.partial(decode_alone, size=size)
    measured = measured_part(pool.imap(decode, paths, chunksize=BATCH_SIZE), len(paths))
    pool.close()
    pool.join()
    return measured


def main(kind: str, folder: Path, model: str, width: int, height: int) -> None:
    """Make the pass of a kind and print what it took."""
    paths = [str(path) for path in sorted((folder / "data").glob("*.jpg"))]
    loader = None if kind == "fresh" else prepare_loader(folder, model)
    sizes = {"fresh": (SIDE, SIDE), "pillow": (SIDE, SIDE), "fitted": (SIDE, SIDE * height // width)}
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    before = [resource.getrusage(one) for one in who]
    measured = our_pass(loader) if loader and kind == "ours" else pillow_pass(paths, sizes[kind])
    receiving, decoding = (
        [after.ru_utime - first.ru_utime, after.ru_stime - first.ru_stime]
        for after, first in zip((resource.getrusage(one) for one in who), before, strict=True)
    )
    record: dict[str, Any] = {
        "images": measured,
        "receiving_ms": 1000 * sum(receiving) / len(paths),
        "user_ms": 1000 * decoding[0] / len(paths),
        "system_ms": 1000 * decoding[1] / len(paths),
    }
    if loader and kind == "ours":
        record["scaling_ms"] = scaling_milliseconds(loader)
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
