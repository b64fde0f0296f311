"""Two real processes under torchrun against one, on a chat model: the same training, the same evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_edge_ft.errors import UserError
from glm_edge_ft.training.processes import PROCESSES_FILE, read_processes
from tests.conftest import TokenizerMaker
from tests.launch import ZERO_2, ZERO_3, launch
from tests.model_folders import save_model_folder
from tests.runs import LORA, PREFIX, do_run, losses, weights, write_chat_data

pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")

KINDS: dict[str, dict[str, Any] | None] = {"lora": {**LORA, "lora_dropout": 0.0}, "full": None, "prefix": PREFIX}
MODES: dict[str, dict[str, Any]] = {"ddp": {}, "zero2": {"deepspeed": ZERO_2}, "zero3": {"deepspeed": ZERO_3}}
# Full fine-tuning of random weights: a step that is too long makes rounding errors grow.
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "save_steps": 4}

Runs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return a folder with a tiny chat model and its data."""
    folder = tmp_path_factory.mktemp("distributed")
    save_model_folder(folder / "model", make_tokenizer("glm"))
    write_chat_data(folder / "data", train=20)  # whole batches alone: two processes fill up the last one
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """Return a function from an adapter and a way of working together to the output folder of such a run.

    Each run is done once, at first use: by one process with a batch of 4, or by two with batches of 2.
    """
    done: dict[tuple[str, str], Path] = {}

    def run(kind: str, mode: str) -> Path:
        if (kind, mode) not in done:
            output, data, model = folder / f"{mode}-{kind}", folder / "data", folder / "model"
            if mode == "one":
                done[kind, mode] = do_run(output, data, model, peft=KINDS[kind], **TRAINING)
            else:
                settings = {**TRAINING, "per_device_train_batch_size": 2, **MODES[mode]}
                done[kind, mode] = launch(output, data, model, processes=2, peft=KINDS[kind], **settings)
        return done[kind, mode]

    return run


def assert_close(expected: Path, found: Path) -> None:
    """Fail unless both runs logged the same losses and both folders hold the same weights, within 1e-4."""
    assert losses(found).keys() == losses(expected).keys()
    for step, (loss, *_) in losses(expected).items():
        assert losses(found)[step][0] == pytest.approx(loss, abs=1e-4), step
    one, other = weights(expected), weights(found)
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_model_of_one(runs: Runs, kind: str, mode: str) -> None:
    """T3, T1: the same global batch gives the same losses and weights; a prefix is saved under ZeRO-3 and all."""
    assert_close(runs(kind, "one"), runs(kind, mode))


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy checkpoint 4 and the run's record, as if the run had been stopped there."""
    target.mkdir()
    shutil.copytree(source / "checkpoint-4", target / "checkpoint-4")
    shutil.copy(source / "run.json", target / "run.json")


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_tells_how_its_run_shared_the_work(runs: Runs, mode: str) -> None:
    """R5: by its record, and by the names of its files as well."""
    checkpoint = runs("lora", mode) / "checkpoint-4"
    recorded = read_processes(checkpoint)
    assert (recorded.world_size, recorded.zero_stage) == (2, {"ddp": None, "zero2": 2, "zero3": 3}[mode])
    (checkpoint / PROCESSES_FILE).rename(checkpoint / "aside")
    derived = read_processes(checkpoint)
    (checkpoint / "aside").rename(checkpoint / PROCESSES_FILE)
    assert (derived.world_size, derived.zero_stage, derived.cut) == (recorded.world_size, recorded.zero_stage, None)


def test_a_checkpoint_of_two_processes_goes_on_in_one(
    runs: Runs, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R5: with the accumulation that keeps the step, the run ends where the uninterrupted one does."""
    copy_checkpoint(runs("lora", "ddp"), folder / "fewer")
    settings = {**TRAINING, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    do_run(folder / "fewer", folder / "data", folder / "model", peft=KINDS["lora"], resume="yes", **settings)
    assert "written by 2 processes, this run has 1: a step takes 4 conversations as before" in capsys.readouterr().err
    assert sorted(losses(folder / "fewer")) == [5, 6]
    for step, (loss, *_) in losses(folder / "fewer").items():
        assert losses(runs("lora", "ddp"))[step][0] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_a_checkpoint_of_deepspeed_does_not_go_on_without_it(runs: Runs, folder: Path, mode: str) -> None:
    """R5: refused before the weights; transformers would go on with a new optimizer and say nothing."""
    output = folder / f"without-{mode}"
    copy_checkpoint(runs("lora", mode), output)
    settings = {**TRAINING, "per_device_train_batch_size": 2}
    with pytest.raises(UserError, match=f"2 processes with ZeRO-{mode[-1]}, this run works without DeepSpeed"):
        do_run(output, folder / "data", folder / "model", peft=KINDS["lora"], resume="yes", **settings)
