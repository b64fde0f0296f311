"""SIGTERM: a cluster takes its machine back, and the same command with `yes` goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_edge_ft.training.checkpoints import find_checkpoints
from glm_edge_ft.training.termination import Terminated, Termination
from tests.conftest import TokenizerMaker
from tests.launch import ZERO_3, Started, launch, start
from tests.model_folders import save_model_folder
from tests.runs import LORA, assert_same_bits, do_run, losses, metrics, write_chat_data

pytestmark = pytest.mark.fault(by_default=True)

# Endless, unless it is stopped; the learning rate does not depend on the number of steps.
ENDLESS: dict[str, Any] = {
    "max_steps": 1_000_000,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "save_strategy": "no",
}


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a tiny chat model and its data."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    write_chat_data(tmp_path / "data", train=20)
    return tmp_path


def has_logged(output: Path, step: int) -> Callable[[], bool]:
    """Return a function that tells whether the run in `output` has logged a step."""
    return lambda: (output / "metrics.jsonl").is_file() and step in losses(output)


def evaluations(output: Path) -> dict[int, float]:
    """Return the loss of each evaluation during training, by its step."""
    return {line["step"]: line["eval_loss"] for line in metrics(output) if "eval_loss" in line}


def saved_step(run: Started, output: Path) -> int:
    """Wait for the end of a run that SIGTERM stops, and return the step of the one checkpoint that it left."""
    said = run.end(code=None)
    (checkpoint,) = find_checkpoints(output)
    assert checkpoint.defect == ""
    expected = f"stopped: by SIGTERM after step {checkpoint.step} of 1000000; {checkpoint.path} is whole"
    assert said.count(expected) == 1
    assert said.count("the same command with `yes` as RESUME goes on from it") == 1
    return checkpoint.step


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    """Bit for bit, dropout included, also where the config asks for no checkpoints."""
    output, data, model = folder / "stopped", folder / "data", folder / "model"
    run = start(output, data, model, **ENDLESS)
    run.wait_until(has_logged(output, 3), "step 3")
    run.process.terminate()
    step = saved_step(run, output)
    assert run.process.returncode == 1
    settings = {**ENDLESS, "max_steps": step + 3}
    do_run(output, data, model, resume="yes", **settings)
    whole = do_run(folder / "whole", data, model, **settings)
    assert losses(output) == losses(whole)
    assert_same_bits(output, whole)


def test_an_evaluation_is_broken_off_and_made_up_for(folder: Path) -> None:
    """The checkpoint of its step is saved; going on begins with the evaluation."""
    output, data, model = folder / "stopped", folder / "data", folder / "model"
    shared = {**ENDLESS, "val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    long: dict[str, Any] = {
        "generation_config": {"min_new_tokens": 800, "max_new_tokens": 800}
    }  # seconds for each of seven replies
    run = start(output, data, model, **shared, **long)
    run.wait_until((output / "predictions" / "eval-2.jsonl").exists, "the first evaluation")
    run.process.terminate()
    assert saved_step(run, output) == 2
    assert [line for line in metrics(output) if "eval_loss" in line] == []
    settings = {**shared, "max_steps": 4, "predict_with_generate": False}
    do_run(output, data, model, resume="yes", **settings)
    whole = do_run(folder / "whole", data, model, **settings)
    assert sorted(evaluations(output)) == [2, 4]
    assert evaluations(output) == evaluations(whole)
    assert losses(output) == losses(whole)
    assert_same_bits(output, whole)


@pytest.mark.parametrize(
    ("mode", "tokens"),
    [pytest.param("ddp", 100, marks=pytest.mark.fault), pytest.param("zero3", 30, marks=pytest.mark.slow)],
)
def test_two_processes_break_an_evaluation_off_together(folder: Path, mode: str, tokens: int) -> None:
    """T6: in the middle of the replies, of which each process makes its own; going on makes up for all of them."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    output, data, model = folder / "stopped", folder / "data", folder / "model"
    # Many replies, so that the signal comes before the last; short ones, since torchrun waits no more than 30 seconds.
    shared: dict[str, Any] = {**ENDLESS, "val": "train.jsonl", "eval_strategy": "steps", "eval_steps": 2}
    shared |= {"per_device_eval_batch_size": 1}
    shared |= {"processes": 2, "per_device_train_batch_size": 2} | ({"deepspeed": ZERO_3} if mode == "zero3" else {})
    long: dict[str, Any] = {"generation_config": {"min_new_tokens": tokens, "max_new_tokens": tokens}}
    run = start(output, data, model, **shared, **long)
    run.wait_until((output / "predictions" / "eval-2.jsonl").exists, "the first evaluation")
    run.process.terminate()
    assert saved_step(run, output) == 2
    assert evaluations(output) == {}
    settings = {**shared, "max_steps": 4, "generation_config": {"max_new_tokens": 4}, "per_device_eval_batch_size": 6}
    launch(output, data, model, resume="yes", **settings)
    whole = launch(folder / "whole", data, model, **settings)
    assert sorted(evaluations(output)) == [2, 4]
    assert evaluations(output) == evaluations(whole)
    for step in (2, 4):
        found, expected = ((run / "predictions" / f"eval-{step}.jsonl").read_text() for run in (output, whole))
        assert found == expected
    assert losses(output) == losses(whole)
    assert_same_bits(output, whole)


def test_the_evaluation_after_training_is_broken_off_and_done_again(folder: Path) -> None:
    """The final model is kept, and a checkpoint from which `yes` evaluates it."""
    output, data, model = folder / "stopped", folder / "data", folder / "model"
    shared = {**ENDLESS, "max_steps": 2, "test": "test.jsonl", "per_device_eval_batch_size": 1}
    run = start(output, data, model, **shared, generation_config={"min_new_tokens": 800, "max_new_tokens": 800})
    run.wait_until((output / "predictions" / "test-2.jsonl").exists, "the evaluation of the test data")
    run.process.terminate()
    assert f"the final model is in {output}" in run.end(code=1)
    do_run(output, data, model, resume="yes", **shared)
    assert sorted(losses(output)) == [1, 2]
    assert [line["step"] for line in metrics(output) if "test_loss" in line] == [2]


@pytest.mark.parametrize("mode", ["zero3", pytest.param("ddp", marks=pytest.mark.fault)])
def test_two_processes_stop_together(folder: Path, mode: str) -> None:
    """torchrun hands the signal on; the checkpoint is whole, one of them speaks, and going on equals one process."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    output, data, model = folder / "stopped", folder / "data", folder / "model"
    settings = {**ENDLESS, "peft": LORA | {"lora_dropout": 0.0}}
    shared = settings | {"per_device_train_batch_size": 2} | ({"deepspeed": ZERO_3} if mode == "zero3" else {})
    run = start(output, data, model, processes=2, **shared)
    run.wait_until(has_logged(output, 3), "step 3")
    run.process.terminate()
    step = saved_step(run, output)
    launch(output, data, model, processes=2, resume="yes", **(shared | {"max_steps": step + 2}))
    one = do_run(folder / "one", data, model, **(settings | {"max_steps": step + 2}))
    assert sorted(losses(output)) == list(range(1, step + 3))
    for number, (loss, *_) in losses(one).items():
        assert losses(output)[number][0] == pytest.approx(loss, rel=1e-4), number


def test_before_training_the_run_ends_at_once() -> None:
    """There is nothing to save."""
    with pytest.raises(Terminated, match="before training began; there was nothing to save"), Termination():
        os.kill(os.getpid(), signal.SIGTERM)


def test_afterwards_the_signal_is_noted() -> None:
    """One process knows at once; a second signal changes nothing."""
    with Termination() as termination:
        termination.defer(torch.device("cpu"))
        assert (termination.poll_stop(), termination.poll_stop_async()) == (False, False)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert (termination.poll_stop(), termination.poll_stop_async()) == (True, True)


def test_a_forked_process_dies_of_the_signal_as_ever() -> None:
    """It must neither save nor speak for the run."""
    with Termination() as termination:
        termination.defer(torch.device("cpu"))
        ready, say_ready = os.pipe()  # Python drops signals that reach a child before it is set up
        child = os.fork()
        if child == 0:
            try:
                os.write(say_ready, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert not termination.poll_stop()
