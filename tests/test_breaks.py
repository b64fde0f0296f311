"""What breaks a run in the middle: numbers that are not finite, images that vanish, processes that die, no memory."""

from __future__ import annotations

import re
import resource
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from glm_edge_ft.errors import RunStopped
from glm_edge_ft.training.checkpoints import find_checkpoints
from tests.launch import Started, start
from tests.runs import LORA, assert_same_bits, do_run, losses, metrics, weights, write_chat_data
from tests.vision_folders import save_vision_folder, write_vision_data

pytestmark = pytest.mark.fault(by_default=True)

ENDLESS: dict[str, Any] = {
    "max_steps": 1_000_000,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "save_steps": 3,
    "save_total_limit": 2,
}
AT_ONCE = {"max_tokens_per_pass": 1_000_000}
DECODED_ANEW = {"cache_image_features": False}  # else no image is opened again once its vectors are kept


@pytest.fixture
def vision(tmp_path: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a tiny vision model and its data."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_vision_folder(tmp_path / "model", backend)
    write_vision_data(tmp_path / "data")
    return tmp_path


def has_saved(run: Started, output: Path) -> None:
    """Wait until the run has a checkpoint."""
    run.wait_until(lambda: any(output.glob("checkpoint-*")), "a checkpoint")


def assert_says_how_to_go_on(said: str, output: Path) -> None:
    """Fail unless the last checkpoint is whole and named as what the run goes on from, once and with no traceback."""
    found = find_checkpoints(output)
    assert {checkpoint.defect for checkpoint in found} == {""}
    assert said.count(f"{found[-1].path} is whole, and the same command with `yes` as RESUME goes on from it") == 1
    assert "Traceback" not in said, said


def make_gradients_overflow(model: Path) -> dict[str, torch.Tensor]:
    """Scale two weights against one another: the outputs stay, the gradient's norm overflows; return all weights."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1e-30
    tensors["lm_head.weight"] *= 1e30
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_used(chat_folder: Path) -> None:
    """M4: the loss of that step is finite still; no checkpoint holds a weight that is not."""
    make_gradients_overflow(chat_folder / "model")
    with pytest.raises(RunStopped, match=r"^the gradient of step 1 is inf: lower training_args\.learning_rate"):
        do_run(chat_folder / "output", chat_folder / "data", chat_folder / "model", peft=None)


def test_steps_with_such_a_gradient_are_left_out_and_counted(
    chat_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """M4: with `on_nonfinite_loss: warn` the weights stay as they were, and the losses are logged as they are."""
    before = make_gradients_overflow(chat_folder / "model")
    settings: dict[str, Any] = {"peft": None, "max_steps": 3, "top": {"on_nonfinite_loss": "warn"}}
    output = do_run(chat_folder / "output", chat_folder / "data", chat_folder / "model", **settings)
    said = capsys.readouterr().err
    for step in (1, 2, 3):
        assert f"the gradient of step {step} is inf ({step} so far)" in said
    after = weights(output)
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []
    assert all(0 < line["loss"] < 100 for line in metrics(output) if "loss" in line)


@pytest.mark.fault
def test_an_image_that_vanishes_ends_the_run_with_its_name(vision: Path) -> None:
    """I3: after the check, read by a loader process; put back, the run goes on."""
    output, image = vision / "output", vision / "data" / "images" / "4.png"
    settings = {**ENDLESS, "dataloader_num_workers": 1, "script": "finetune_vision.py", "top": DECODED_ANEW}
    run = start(output, vision / "data", vision / "model", **settings)
    has_saved(run, output)
    image.rename(vision / "4.png")
    said = run.end(code=1)
    assert (
        f"stopped: an image that was there before training cannot be read now: {image}: there is no such file" in said
    )
    assert_says_how_to_go_on(said, output)
    (vision / "4.png").rename(image)
    (*_, last) = find_checkpoints(output)
    again = {**ENDLESS, "max_steps": last.step + 1, "takes_images": True, "top": DECODED_ANEW}
    do_run(output, vision / "data", vision / "model", resume="yes", **again)
    assert last.step + 1 in losses(output)


@pytest.mark.fault
def test_an_image_that_vanishes_is_skipped_and_counted_where_the_config_says_so(vision: Path) -> None:
    """I3, `on_bad_image: skip`: the run goes on, and says which image is missing."""
    output, image = vision / "output", vision / "data" / "images" / "4.png"
    top = {"on_bad_image": "skip", **DECODED_ANEW}
    settings = {**ENDLESS, "dataloader_num_workers": 1, "script": "finetune_vision.py", "top": top}
    run = start(output, vision / "data", vision / "model", **settings)
    has_saved(run, output)
    image.unlink()
    note = f"note: an image that was there before training cannot be read now: {image}: there is no such file; its rows"
    run.wait_until(lambda: note in run.said(), "the note")
    reached = max(losses(output))
    run.wait_until(lambda: max(losses(output)) > reached + 8, "more steps")
    run.process.terminate()
    assert "(on_bad_image: skip; 1 such images so far)" in run.end(code=1)
    assert all(0 < loss < 100 for loss, *_ in losses(output).values())


@pytest.mark.fault
def test_a_loader_process_that_dies_ends_the_run_with_what_to_lower(chat_folder: Path) -> None:
    """As the system ends one when memory is short."""
    output = chat_folder / "output"
    run = start(output, chat_folder / "data", chat_folder / "model", **ENDLESS, dataloader_num_workers=2)
    has_saved(run, output)

    def has_ended() -> bool:
        for child in psutil.Process(run.process.pid).children():
            child.send_signal(signal.SIGKILL)
        return run.process.poll() is not None

    while not has_ended():  # one that has done its work may be killed without harm
        pass
    said = run.end(code=1)
    assert "stopped: a process that loads data ended by itself (DataLoader worker (pid" in said
    assert "lower training_args.dataloader_num_workers, now 2; with 0 there is no such process" in said
    assert_says_how_to_go_on(said, output)


@pytest.mark.fault
def test_a_lack_of_memory_says_what_to_lower_with_the_numbers(chat_folder: Path) -> None:
    """The system gives no more than there is at that moment; a step needs some hundred megabytes."""
    output = chat_folder / "output"
    write_chat_data(chat_folder / "more", train=800)
    settings = {**ENDLESS, "per_device_train_batch_size": 400, "gradient_accumulation_steps": 2, "top": AT_ONCE}
    run = start(output, chat_folder / "more", chat_folder / "model", **settings)
    run.wait_until((output / "loss.png").is_file, "the first curve")  # all libraries are loaded
    process = psutil.Process(run.process.pid)
    process.suspend()
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, resource.RLIM_INFINITY))
    process.resume()
    said = run.end(code=1)
    assert "stopped: out of memory in a step of up to 400 x " in said, said
    assert re.search(r"Lower, in this order: max_tokens_per_pass: \d+ \(the same result\); ", said), said
    assert "training_args.activation_checkpointing: true" in said
    assert_says_how_to_go_on(said, output)


@pytest.mark.fault
def test_ctrl_c_ends_the_run_and_costs_the_steps_since_the_last_checkpoint_alone(chat_folder: Path) -> None:
    """The same command with `yes` ends as the run that nobody stopped, bit for bit."""
    output, data, model = chat_folder / "output", chat_folder / "data", chat_folder / "model"
    run = start(output, data, model, **ENDLESS, peft=LORA)
    has_saved(run, output)
    run.process.send_signal(signal.SIGINT)
    said = run.end(code=1)
    assert "stopped by Ctrl-C; the same command with `yes` at its end continues from the last checkpoint" in said
    assert "Traceback" not in said
    (*_, last) = find_checkpoints(output)
    settings = {**ENDLESS, "max_steps": last.step + 4, "peft": LORA}
    do_run(output, data, model, resume="yes", **settings)
    whole = do_run(chat_folder / "whole", data, model, **settings)
    assert losses(output) == losses(whole)
    assert_same_bits(output, whole)
