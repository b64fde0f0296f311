"""Whole runs on a tiny model: continued, refused, and set aside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_edge_ft.errors import UserError
from tests.runs import (
    LORA,
    PREFIX,
    assert_same_bits,
    losses,
    metrics,
    weights,
)

Run = Callable[..., Path]


@pytest.mark.parametrize("peft", [LORA, None, PREFIX], ids=["lora", "full", "prefix"])
@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    run: Run, peft: dict[str, Any] | None, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """R3, T1: 6 steps at once, over two epochs and with dropout, against 4 and a resume to 6."""
    whole = run("whole", peft, train_sampling_strategy=strategy, save_steps=4)
    (whole.parent / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-4", whole.parent / "resumed" / "checkpoint-4")
    resumed = run("resumed", peft, resume="yes", train_sampling_strategy=strategy, save_steps=4)
    assert f"continuing from {resumed / 'checkpoint-4'}" in capsys.readouterr().err
    assert sorted(losses(whole)) == [1, 2, 3, 4, 5, 6]
    assert losses(resumed) == {step: line for step, line in losses(whole).items() if step > 4}
    assert_same_bits(whole, resumed)
    assert_same_bits(whole / "checkpoint-6", resumed / "checkpoint-6")


def test_resuming_at_the_end_of_an_epoch_equals_the_uninterrupted_run(run: Run) -> None:
    """R3: 18 rows in batches of 4 make 5 steps an epoch; the checkpoint lies exactly between two epochs."""
    whole = run("whole", max_steps=8, save_steps=5)
    (whole.parent / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-5", whole.parent / "resumed" / "checkpoint-5")
    resumed = run("resumed", resume="5", max_steps=8, save_steps=5)
    assert losses(resumed) == {step: line for step, line in losses(whole).items() if step > 5}
    assert_same_bits(whole, resumed)


@pytest.mark.fault(by_default=True)
@pytest.mark.parametrize("settings", [{}, {"max_steps": 7, "save_strategy": "no"}], ids=["finished", "steps left"])
def test_a_checkpoint_that_a_killed_run_had_no_time_to_remove_goes(run: Run, settings: dict[str, Any]) -> None:
    """R1: killed between a new checkpoint and the removal of an old one; `yes` makes up for it."""
    output = run(save_steps=2)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]
    run(resume="yes", **{"save_steps": 2, "save_total_limit": 2, **settings})
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_finished_run_takes_no_step_and_is_evaluated(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """R4: `yes` on a run that has all its steps."""
    output = run(val="dev.jsonl", eval_strategy="steps", eval_steps=6)
    before = weights(output / "checkpoint-6")
    capsys.readouterr()
    run(val="dev.jsonl", eval_strategy="steps", eval_steps=6, resume="yes")
    assert "has all steps behind it" in capsys.readouterr().err
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics(output) if "eval_loss" in line] == [6]
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(output).items())


def test_an_unreadable_random_state_is_said_and_passed_over(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """R6: the run continues; it is not bit-exact and says so."""
    output = run(max_steps=4)
    state = output / "checkpoint-2" / "rng_state.pth"
    state.write_bytes(b"\0" * state.stat().st_size)  # of the right size: whole by its manifest
    capsys.readouterr()
    run(max_steps=4, resume="2")
    assert "cannot be read" in capsys.readouterr().err
    assert sorted(losses(output)) == [1, 2, 3, 4]


@pytest.mark.parametrize("broken", ["missing", "empty", "longer"])
def test_a_random_state_of_another_size_costs_no_checkpoint(
    run: Run, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """R6: the checkpoint counts as whole without it."""
    output = run(max_steps=4)
    state = output / "checkpoint-4" / "rng_state.pth"
    content = state.read_bytes()
    state.unlink()
    if broken != "missing":
        state.write_bytes(b"" if broken == "empty" else content + b"x" * 100 + content)
    capsys.readouterr()
    run(max_steps=5, resume="yes")
    said = capsys.readouterr().err
    assert f"continuing from {output / 'checkpoint-4'}" in said
    assert "dropout will differ from the uninterrupted run" in said or broken == "longer"


def test_a_start_that_fails_leaves_the_earlier_run_where_it_is(run: Run, tmp_path: Path, model_folder: Path) -> None:
    """R2: weights that cannot be read, settings that cannot be used: nothing is moved, nothing written over."""
    output = run(max_steps=2)
    record = (output / "run.json").read_bytes()
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        run(max_steps=2, model=broken)
    with pytest.raises(UserError, match=r"training_args\.optim: .*cannot be used here"):
        run(max_steps=2, optim="galore_adamw")
    assert (output / "run.json").read_bytes() == record
    assert (output / "checkpoint-2").is_dir()
    assert not (output / "earlier").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"peft": None}, "peft_config: full fine-tuning, but .* was trained with LORA"),
        ({"peft": PREFIX}, "peft_config: PREFIX_TUNING, but .* was trained with LORA"),
        ({"peft": {**LORA, "r": 8}}, "peft_config.r: 8, but .* was trained with 4"),
        ({"peft": {**LORA, "lora_alpha": 64}}, "peft_config.lora_alpha: 64, but .* was trained with 16"),
        ({"peft": {**LORA, "target_modules": ["q_proj"]}}, r"peft_config.target_modules: \['q_proj'\], but"),
        ({"optim": "sgd"}, "training_args.optim: sgd, but .* was trained with the default"),
    ],
)
def test_a_changed_shape_of_the_training_is_refused_with_both_values(
    run: Run, changes: dict[str, Any], key: str
) -> None:
    """R5: before the weights are read; the checkpoint and its record stay as they were."""
    output = run(max_steps=2)
    record = (output / "run.json").read_bytes()
    with pytest.raises(UserError, match=key):
        run(max_steps=4, resume="yes", **changes)
    assert (output / "run.json").read_bytes() == record


def test_what_changed_and_does_no_harm_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """R5: a learning rate that the saved optimizer keeps, a batch size, more steps."""
    output = run(max_steps=2)
    capsys.readouterr()
    run(max_steps=4, resume="yes", learning_rate=1e-3, per_device_train_batch_size=2)
    said = capsys.readouterr().err
    assert "training_args.learning_rate 0.01 -> 0.001: no effect" in said
    assert "training_args.per_device_train_batch_size 4 -> 2 since the checkpoint was written" in said
    assert "training_args.max_steps 2 -> 4 since the checkpoint was written" in said
    assert sorted(losses(output)) == [1, 2, 3, 4]


def test_a_fresh_start_sets_the_earlier_run_aside(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """R2: `no` starts afresh, and nothing is written over."""
    output = run(max_steps=2)
    old = weights(output)
    run(max_steps=2, resume="no", learning_rate=5e-2)
    earlier = output / "earlier" / "1"
    assert f"it was moved to {earlier}" in capsys.readouterr().err
    assert all(torch.equal(old[name], tensor) for name, tensor in weights(earlier).items())
    assert sorted(path.name for path in earlier.glob("checkpoint-*")) == ["checkpoint-2"]
    assert len(losses(output)) == 2
    assert len(losses(earlier)) == 2


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(run: Run) -> None:
    """R1: what was trained after checkpoint 2 neither mixes with the new line nor is lost."""
    output = run(max_steps=6)
    run(max_steps=6, resume="2", save_steps=3)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    assert sorted(path.name for path in (output / "earlier/1").iterdir()) == ["checkpoint-4", "checkpoint-6"]
