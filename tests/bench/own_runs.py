"""Runs of this project's script, and matrix products alone, as processes that are measured side by side."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.bench.slices import Measured, Sliced

BATCH = 16
CONFIG: dict[str, Any] = {
    "data_config": {"train_file": "train.jsonl"},
    "max_input_length": 512,
    "max_output_length": 512,
    "training_args": {
        "learning_rate": 5e-4,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "include_num_input_tokens_seen": "non_padding",
    },
    "peft_config": {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    },
}


@dataclass(frozen=True)
class Throughput:
    """What one run reached.

    Attributes:
        tokens_per_second: real (non-pad) tokens over the seconds of the training loop.
        peak_bytes: the most memory that the process held.
        real_share: real tokens among all that went through the model; None: not counted.
    """

    tokens_per_second: float
    peak_bytes: float
    real_share: float | None = None


@dataclass(frozen=True)
class OwnRun:
    """A run of `finetune.py`.

    Attributes:
        process: to be measured.
        output: the folder that it writes to.
    """

    process: Sliced
    output: Path

    def reached(self, measured: Measured) -> Throughput:
        """Return what it reached, from its log and the seconds that it was let run."""
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        tokens = max(json.loads(line).get("num_input_tokens_seen", 0) for line in lines)
        return Throughput(tokens / measured.seconds, measured.peak_bytes)


def own_run(work: Path, workload: Path, steps: int, top: Mapping[str, Any] | None = None, **training: Any) -> OwnRun:
    """Describe a run of `finetune.py` with LoRA in float32.

    Args:
        work: an existing folder of its own, for its config and output.
        workload: a folder with `data` and `model`; the encoded rows are kept in it, too.
        steps: how many it trains.
        top: keys of the config beside `CONFIG`.
        training: keys of its `training_args`.
    """
    arguments = CONFIG["training_args"] | {"output_dir": f"{work}/output", "max_steps": steps} | training
    config = work / "run.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, **(top or {}), "training_args": arguments}), encoding="utf-8")
    command = [sys.executable, "-m", "tests.bench.train_process"]
    command += [str(workload / "data"), str(workload / "model"), str(config)]
    environment = {"GLM_EDGE_FT_CACHE": f"{workload}/cache", "HF_HUB_OFFLINE": "1"}
    return OwnRun(Sliced(command, steps, environment), work / "output")


def products_alone(steps: int) -> Sliced:
    """Describe a process that multiplies matrices as large as the workload's; its output is the FLOP of all steps."""
    return Sliced([sys.executable, "-m", "tests.bench.limit_process", str(steps)], steps)


def flops_of(products: Measured) -> float:
    """Return the FLOP a second of matrix products alone."""
    return float(products.output) / products.seconds


def count_parameters(workload: Path) -> int:
    """Return the number of weights of the workload's model, from the headers of its files."""
    total = 0
    for path in (workload / "model").glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
