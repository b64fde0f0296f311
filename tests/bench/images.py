"""What images cost: bytes of cache and peak memory, against the number of rows and against storing pixels.

    python -m tests.bench.images [--rows 3000] [--steps 20] [--rounds 3]

Each case is a real run of `finetune_vision.py` in a process of its own, in which every row has a photograph of
640 x 480 pixels: a tenth of the rows, all rows that share one image file, and all rows with an image file each. Found
are the peak memory of the run (the most that the process held at once), its cache on disk, and what the same rows
would take as stored float32 pixels.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import yaml
from PIL import Image

from tests.bench.measure import ROOT, in_turn, median_ratio, run_process
from tests.bench.result import Ratio, Result, Table, installed, keep

PIXEL_BYTES = 3 * 672 * 672 * 4
CONFIG = {
    "data_config": {"train_file": "train.jsonl"},
    "max_input_length": 1024,
    "max_output_length": 16,
    "freezeV": True,
    "training_args": {
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "logging_steps": 10,
    },
    "peft_config": {"peft_type": "LORA", "r": 4},
}


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Attributes:
        rows, images: rows of the data, and image files that they name.
        image_bytes: size of these files.
        cache_bytes: the encoded data on disk.
        cache_bytes_per_row: the same for each row.
        stored_pixels_ratio: how many times as much the rows' pixels would take as float32.
        peak_bytes: the most memory that the process held.
    """

    rows: int
    images: int
    image_bytes: int
    cache_bytes: int
    cache_bytes_per_row: int
    stored_pixels_ratio: int
    peak_bytes: int


def write_data(folder: Path, rows: int, images: int, size: tuple[int, int] = (640, 480)) -> int:
    """Write rows that share `images` image files of `size` evenly; return the bytes of these files."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(images):
        coarse = Image.fromarray(generator.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)
    lines = []
    for number in range(rows):
        question = [{"type": "image", "image": f"{number % images}.jpg"}, {"type": "text", "text": f"图 {number}？"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"第 {number} 张"}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.jpg"))


def measure(model: str, rows: int, images: int, steps: int) -> Cost:
    """Run the vision script on such data, in a folder that is removed afterwards, and return what it took."""
    with tempfile.TemporaryDirectory() as work:
        return _measure_in(Path(work), model, rows, images, steps)


def _measure_in(work: Path, model: str, rows: int, images: int, steps: int) -> Cost:
    image_bytes = write_data(work / "data", rows, images)
    training = {**CONFIG["training_args"], "output_dir": str(work / "output"), "max_steps": steps}  # type: ignore[dict-item]
    (work / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"training_args": training}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "finetune_vision.py"), str(work / "data"), model, str(work / "run.yaml")]
    done = run_process(command, {"GLM_EDGE_FT_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"})
    cache_bytes = sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file())
    return Cost(
        rows=rows,
        images=images,
        image_bytes=image_bytes,
        cache_bytes=cache_bytes,
        cache_bytes_per_row=cache_bytes // rows,
        stored_pixels_ratio=rows * PIXEL_BYTES // cache_bytes,
        peak_bytes=done.peak_bytes,
    )


def main(
    *,
    rows: Annotated[int, typer.Option(help="Rows of the large cases.")] = 3000,
    steps: Annotated[int, typer.Option(help="Training steps of four rows.")] = 20,
    rounds: Annotated[int, typer.Option(help="Runs of each case, in turn.")] = 3,
    model: Annotated[str, typer.Option(help="A vision model.")] = "glm-edge-v-nano",
) -> None:
    """Measure the three cases and compare them."""
    cases = {
        "a tenth of the rows": (rows // 10, rows // 10),
        "one image for all rows": (rows, 1),
        "an image for each row": (rows, rows),
    }
    costs = in_turn(rounds, *(partial(measure, model, count, images, steps) for count, images in cases.values()))
    peaks = [[cost.peak_bytes / 2**20 for cost in of_case] for of_case in costs]
    rows_of_table = [
        (name, one.rows, one.images, one.cache_bytes_per_row, one.stored_pixels_ratio, statistics.median(peak))
        for name, (one, *_), peak in zip(cases, costs, peaks, strict=True)
    ]
    small, _, large = peaks
    keep(
        Result(
            name="images",
            title="What images cost",
            command=f"python -m tests.bench.images --rows {rows} --steps {steps} --rounds {rounds}",
            ratios=[
                Ratio("cache on disk a row with an image", costs[-1][0].cache_bytes_per_row, 4096, False, "bytes"),
                Ratio("peak memory, all rows / a tenth of them", median_ratio(large, small), 1.1, False),
            ],
            tables=[
                Table(
                    (
                        "case",
                        "rows",
                        "image files",
                        "cache, bytes a row",
                        "stored float32 pixels / cache",
                        "peak memory, MiB",
                    ),
                    rows_of_table,
                )
            ],
            notes=[
                "Each case is a run of `finetune_vision.py` on the CPU in a process of its own: LoRA, batches of four, "
                f"{steps} steps, photographs of 640 x 480, runs of each case: {rounds}. The peak is the most that its "
                "process held at once.",
            ],
            versions=installed("pillow"),
        )
    )


if __name__ == "__main__":
    typer.run(main)
