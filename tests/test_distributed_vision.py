"""Two real processes under torchrun against one, on rows with and without images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.launch import ZERO_3, launch
from tests.runs import LORA, assert_close
from tests.vision_folders import save_vision_folder, write_vision_data

pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")

# One row a process and step, in random order: some steps have an image in one process only.
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "train_sampling_strategy": "random",
    "save_strategy": "no",
    "script": "finetune_vision.py",
}
MODES: dict[str, dict[str, Any]] = {"zero3": {"deepspeed": ZERO_3}, "ddp": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backend: Tokenizer) -> Path:
    """Return a folder with a tiny vision model and its data."""
    folder = tmp_path_factory.mktemp("distributed")
    save_vision_folder(folder / "model", backend)
    write_vision_data(folder / "data")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peft", [LORA | {"lora_dropout": 0.0}, None], ids=["lora", "full"])
def test_two_processes_train_the_model_of_one(folder: Path, peft: dict[str, Any] | None, mode: str) -> None:
    """T5, T3: under ZeRO-3 and with averaged gradients; nothing hangs where one process has no image in its batch."""
    kind, data, model = "full" if peft is None else "lora", folder / "data", folder / "model"
    settings = {
        **TRAINING,
        "peft": peft,
        "top": {"freezeV": peft is not None, "max_input_length": 128, "max_output_length": 32},
    }
    one = folder / f"one-{kind}"
    if not one.exists():
        launch(one, data, model, per_device_train_batch_size=2, **settings)
    shared = {**settings, **MODES[mode], "per_device_train_batch_size": 1}
    two = launch(folder / f"{mode}-{kind}", data, model, processes=2, **shared)
    assert_close(one, two)
