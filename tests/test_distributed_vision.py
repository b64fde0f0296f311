"""Two real processes under torchrun against one, on rows with and without images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tokenizers import Tokenizer

from tests.runs import LORA, losses, weights
from tests.vision_folders import save_vision_folder, write_vision_data

pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")

SCRIPT = Path(__file__).resolve().parents[1] / "finetune_vision.py"
ZERO_3 = SCRIPT.parent / "configs" / "ds_zero_3.json"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2")
SECONDS = 240  # a run takes ten; one that hangs is ended, with all its processes
# One row a process and step, in random order: some steps have an image in one process only.
TRAINING: dict[str, Any] = {
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "random",
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backend: Tokenizer) -> Path:
    """Return a folder with a tiny vision model and its data."""
    folder = tmp_path_factory.mktemp("distributed")
    save_vision_folder(folder / "model", backend)
    write_vision_data(folder / "data")
    return folder


def start(folder: Path, name: str, launcher: Sequence[str], top: dict[str, Any], **training: Any) -> Path:
    """Do one run in processes of its own and return its output folder."""
    config = {
        "data_config": {"train_file": "train.jsonl"},
        "max_input_length": 128,
        "max_output_length": 32,
        "training_args": {**TRAINING, "output_dir": str(folder / name), **training},
        **top,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, *launcher, str(SCRIPT), str(folder / "data"), str(folder / "model"), str(path)]
    environment = os.environ | {"GLM_EDGE_FT_CACHE": str(folder / "cache")}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.kill()  # torchrun's workers are in sessions of their own
        said, _ = process.communicate()
        pytest.fail(f"{name} did not end within {SECONDS} seconds:\n{said[-3000:]}")
    assert process.returncode == 0, said[-3000:]
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("peft", [LORA | {"lora_dropout": 0.0}, None], ids=["lora", "full"])
def test_two_processes_train_the_model_of_one(folder: Path, peft: dict[str, Any] | None) -> None:
    """T5, T3: under ZeRO-3 and with averaged gradients; nothing hangs where one process has no image in its batch."""
    kind, top = "full" if peft is None else "lora", {"peft_config": peft, "freezeV": peft is not None}
    one = start(folder, f"one-{kind}", (), top, per_device_train_batch_size=2)
    for mode, settings in (("zero3", {"deepspeed": str(ZERO_3)}), ("ddp", {})):
        two = start(folder, f"{mode}-{kind}", TORCHRUN, top, per_device_train_batch_size=1, **settings)
        for step, (loss, *_) in losses(one).items():
            assert losses(two)[step][0] == pytest.approx(loss, abs=1e-4), (mode, step)
        expected, found = weights(one), weights(two)
        assert expected.keys() == found.keys(), mode
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=0, atol=1e-4, msg=f"{mode}: {name}")
