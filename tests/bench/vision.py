"""Images per second of the loader, against Pillow alone on as many processes.

    python -m tests.bench.vision [--images 800] [--rounds 3]

Ours: the loader of a real vision run, two processes that read rows, decode photographs, fit them into 672 x 672, make
batches and hand them to a third. What it then costs to scale the bytes where the model computes is measured apart.
Pillow: two processes that decode and resize the same files to 672 x 672, give nothing back and know of no batch. All
take turns of two seconds (`slices.py`); the first quarter of each pass is not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.images import write_data
from tests.bench.measure import median_ratio
from tests.bench.result import Ratio, Result, Table, installed, keep
from tests.bench.slices import Sliced, side_by_side
from tests.bench.vision_process import BATCH_SIZE, PROCESSES

SIZES = ((640, 480), (1600, 1200))
KINDS = {
    "ours": "our loader",
    "pillow": "Pillow to 672 x 672",
    "fitted": "Pillow to our proportions",
    "fresh": "Pillow to 672 x 672, nothing else in its process",
}


def one_round(work: Path, model: str, size: tuple[int, int], images: int) -> dict[str, dict[str, float]]:
    """Make a pass of each kind side by side; return for each what it says of itself and its images per second."""
    command = [sys.executable, "-m", "tests.bench.vision_process"]
    end = [str(work), model, *map(str, size)]
    environment = {"GLM_EDGE_FT_CACHE": f"{work}/cache", "HF_HUB_OFFLINE": "1"}
    steps = images * 3 // 4 // BATCH_SIZE
    found = side_by_side(*(Sliced([*command, kind, *end], steps, environment) for kind in KINDS))
    records = [json.loads(run.output.splitlines()[-1]) for run in found]
    rates = [record["images"] / run.seconds for record, run in zip(records, found, strict=True)]
    return {kind: {**record, "rate": rate} for kind, record, rate in zip(KINDS, records, rates, strict=True)}


def main(
    *,
    images: Annotated[int, typer.Option(help="Photographs of each size.")] = 800,
    rounds: Annotated[int, typer.Option(help="Passes over them of each kind.")] = 3,
    model: Annotated[str, typer.Option(help="A vision model.")] = "glm-edge-v-nano",
) -> None:
    """Measure both sizes and keep the result."""
    ratios: list[Ratio] = []
    rows: list[tuple[str | float, ...]] = []
    scaling = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as work:
            write_data(Path(work) / "data", images, images, size)
            found = [one_round(Path(work), model, size, images) for _ in range(rounds)]
        shown = f"{size[0]} x {size[1]}"
        rates = {kind: [of_round[kind]["rate"] for of_round in found] for kind in KINDS}
        places = {"pillow": "Pillow in a process as large", "fresh": "Pillow in a fresh process"}
        for kind, place in places.items():
            what = f"photographs of {shown} a second, our loader / {place}, {PROCESSES} processes each"
            ratios.append(Ratio(what, median_ratio(rates["ours"], rates[kind]), 1.0))
        for kind, name in KINDS.items():
            columns = ("rate", "user_ms", "system_ms", "receiving_ms")
            figures = [statistics.median(of_round[kind][column] for of_round in found) for column in columns]
            rows.append((shown, name, *figures))
        scaling.append(f"{statistics.median(of_round['ours']['scaling_ms'] for of_round in found):.1f} ms ({shown})")
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
                        "way",
                        "images/s",
                        "processor time an image (ms): the two processes",
                        "of the system for them",
                        "process that receives",
                    ),
                    rows,
                )
            ],
            notes=[
                f"Each of the {rounds} rounds measures all side by side, two seconds each in turn; the ratio is the "
                "median over the rounds. The first quarter of a pass is not counted.",
                "Ours reads the encoded rows, decodes, turns as EXIF says, fits into 672 x 672 in the picture's own "
                "proportions, makes batches and hands them to a third process as bytes. Scaled where the model "
                "computes, they are the values that the checkpoint's image processor makes, bit by bit; that is not in "
                f"the figure: beside a step on a GPU it is nothing, on this CPU {' and '.join(scaling)} an image.",
                "Pillow decodes and resizes to the full 672 x 672, which is a third more pixels than a picture of "
                "4 to 3 fills, and gives nothing back; the third way is without that third. It stands in a process "
                "that is as large as ours; in a fresh one the C library returns every picture's memory to the system.",
                "Where ours needs more: fresh pages of shared memory for each batch (the system's time), taking the "
                "bytes out of Pillow, and the process that receives. Pages used again would save most of the "
                "system's time, but a reader that is late would see the next batch's pictures. Resizing "
                "with faster arithmetic than Pillow's would give other pixels than the checkpoint's processor does.",
            ],
            versions=installed("pillow"),
        )
    )


if __name__ == "__main__":
    typer.run(main)
