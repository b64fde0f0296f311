"""Whole runs on several machines: a torchrun for each, joined over this machine's loopback address."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.training.checkpoints import find_checkpoints
from tests.conftest import TokenizerMaker
from tests.launch import REPOSITORY, Started, end_all, launch, start_machines
from tests.model_folders import save_model_folder
from tests.runs import LORA, assert_close, assert_same_bits, do_run, losses, write_chat_data, write_config


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a tiny chat model and its data."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    write_chat_data(tmp_path / "data", train=20)
    return tmp_path


def start_training(folder: Path, output: Path, resume: str | None = None, **settings: Any) -> list[Started]:
    """Start finetune.py on two machines that share the output folder."""
    config = write_config(output, **settings, per_device_train_batch_size=2)
    arguments = [str(folder / "data"), str(folder / "model"), str(config), *([resume] if resume else [])]
    log = folder / f"{output.name}-{resume}.log"
    return start_machines(REPOSITORY / "finetune.py", [arguments, arguments], log, environment=os.environ)


def test_two_machines_train_the_model_of_one_process(folder: Path) -> None:
    """T3: the same losses and weights."""
    settings: dict[str, Any] = {"peft": {**LORA, "lora_dropout": 0.0}, "learning_rate": 1e-3}
    end_all(start_training(folder, folder / "two", **settings))
    assert_close(do_run(folder / "one", folder / "data", folder / "model", **settings), folder / "two")


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_run_and_both_go_on(folder: Path) -> None:
    """R1, R3: with dropout and all, the weights are those of two processes that were never interrupted."""
    output = folder / "killed"
    settings: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    survivor, victim = start_training(folder, output, max_steps=1_000_000, **settings)
    try:
        survivor.wait_until((output / "checkpoint-4").is_dir, "checkpoint 4")
    finally:
        victim.kill()
    said = survivor.end(code=1)
    newest = [found for found in find_checkpoints(output) if not found.defect][-1]
    assert said.count("stopped: another process of the run is gone, or does not answer (") == 1
    way = "and the same command, on all machines, with `yes` as RESUME goes on from it"
    assert f"{newest.path} is whole, {way}" in said
    settings["max_steps"] = newest.step + 3
    end_all(start_training(folder, output, resume="yes", **settings))
    whole, data, model = folder / "whole", folder / "data", folder / "model"
    launch(whole, data, model, processes=2, per_device_train_batch_size=2, **settings)
    assert losses(output) == losses(whole)
    assert_same_bits(output, whole)
