"""Whole runs on a tiny model: batches, losses and what is trained, each against an exact expectation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_edge_ft.errors import RunStopped
from glm_edge_ft.model.precision import detect_hardware
from tests.runs import (
    LORA,
    PREFIX,
    assert_close,
    assert_same_bits,
    conversation,
    losses,
    metrics,
    weights,
)

Run = Callable[..., Path]


def test_loader_processes_change_nothing_and_resume_exactly(run: Run) -> None:
    """R3, T7: two loader processes give the batches of none, also after a resume in the middle of an epoch."""
    without = run("without", save_steps=4)
    shared = {"save_steps": 4, "dataloader_num_workers": 2}
    whole = run("whole", **shared)
    assert losses(whole) == losses(without)
    (whole.parent / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-4", whole.parent / "resumed" / "checkpoint-4")
    resumed = run("resumed", resume="yes", **shared)
    assert losses(resumed) == {step: line for step, line in losses(whole).items() if step > 4}
    assert_same_bits(whole, resumed)


def test_evaluation_does_not_change_training(run: Run) -> None:
    """Loss and generation in between move neither the random state nor the weights."""
    without = run("without")
    between = run("between", val="dev.jsonl", eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert losses(between) == losses(without)
    assert_same_bits(without, between)


@pytest.mark.parametrize("peft", [{**LORA, "lora_dropout": 0.0}, None], ids=["lora", "full"])
def test_accumulated_batches_equal_one_large_batch(run: Run, peft: dict[str, Any] | None) -> None:
    """T3: batch 8 x 1 against 1 x 8; rows differ in length, so a mean of means would differ."""
    shared = {"train_sampling_strategy": "sequential", "max_steps": 2, "save_strategy": "no", "optim": "sgd"}
    large = run("large", peft, per_device_train_batch_size=8, **shared)
    small = run("small", peft, per_device_train_batch_size=1, gradient_accumulation_steps=8, **shared)
    assert_close(large, small)


@pytest.mark.parametrize("peft", [LORA | {"lora_dropout": 0.0}, None, PREFIX], ids=["lora", "full", "prefix"])
@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_a_batch_in_parts_trains_as_the_whole_batch(run: Run, peft: dict[str, Any] | None, strategy: str) -> None:
    """T3: 6 rows at once, and the same in parts of at most 60 tokens: losses, norms and weights."""
    settings = {"peft": peft, "train_sampling_strategy": strategy, "per_device_train_batch_size": 6, "max_steps": 3}
    whole = run("whole", learning_rate=1e-4, **settings)
    parts = run("parts", learning_rate=1e-4, top={"max_tokens_per_pass": 60}, **settings)
    assert_close(whole, parts)


def test_the_logged_loss_is_the_mean_over_supervised_tokens(run: Run, model_folder: Path) -> None:
    """Step 1 against a loss computed apart: every row by itself, on full logits."""
    output = run(
        peft={**LORA, "lora_dropout": 0.0}, train_sampling_strategy="sequential", max_steps=1, save_strategy="no"
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    stop = tokenizer.convert_tokens_to_ids("<|user|>")
    total, count = 0.0, 0
    for number in range(4):
        ids: list[int] = []
        supervised: list[bool] = []
        for message in conversation(number, turns=1 + number % 2)["messages"]:
            role = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
            text = tokenizer("\n" + message["content"], add_special_tokens=False)["input_ids"]
            ids += [role, *text]
            is_reply = message["role"] == "assistant"
            supervised += [role == stop and len(supervised) > 0, *([is_reply] * len(text))]
        ids, supervised = [*ids, stop], [*supervised, True]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, (token, counts) in enumerate(zip(ids, supervised, strict=True)):
            if counts:
                total -= float(log_probabilities[position - 1, token])
                count += 1
    assert losses(output)[1][0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_matrix_moves_fresh_and_resumed(run: Run, checkpointing: bool) -> None:
    """T2: with activation checkpointing and without, the adapter learns everywhere, and resuming keeps that."""
    output = run(activation_checkpointing=checkpointing, max_steps=2)
    before = weights(output)
    assert [name for name, tensor in before.items() if "lora_B" in name and tensor.abs().sum() == 0] == []
    run(activation_checkpointing=checkpointing, max_steps=4, resume="2")
    after = weights(output)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.skipif(not detect_hardware().cpu_has_bf16, reason="this CPU has no bfloat16 instructions")
def test_all_that_is_trained_is_in_float32_on_a_16_bit_base(run: Run) -> None:
    """C7: `modules_to_save` too, which a small update must move; evaluated, resumed and saved in that format."""
    peft = LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}
    settings = {"peft": peft, "bf16": True, "val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 4}
    whole = run("whole", save_steps=4, learning_rate=1e-4, **settings)
    stored = load_file(whole / "adapter_model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.float32}
    assert any("embed_tokens" in name for name in stored)
    moved = [values for name, values in stored.items() if "embed_tokens" in name or "lm_head" in name]
    assert all(torch.count_nonzero(values - values.bfloat16().float()) for values in moved)
    assert any("eval_loss" in line and "eval_bleu-4" in line for line in metrics(whole))
    (whole.parent / "resumed").mkdir()
    (whole / "checkpoint-4").rename(whole.parent / "resumed" / "checkpoint-4")
    resumed = run("resumed", resume="yes", save_steps=4, learning_rate=1e-4, **settings)
    assert_same_bits(whole, resumed)


def test_activation_checkpointing_changes_no_loss(run: Run) -> None:
    """T2: the same numbers, computed twice."""
    plain = run("plain", {**LORA, "lora_dropout": 0.0}, save_strategy="no")
    checkpointed = run("checkpointed", {**LORA, "lora_dropout": 0.0}, save_strategy="no", activation_checkpointing=True)
    assert losses(checkpointed) == losses(plain)


def test_prefix_tuning_with_gradient_checkpointing_trains_with_a_notice(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """T1: the pair crashes in PEFT; the run goes on without checkpointing, evaluates, predicts, saves."""
    output = run(
        peft=PREFIX,
        gradient_checkpointing=True,
        val="dev.jsonl",
        test="test.jsonl",
        eval_strategy="steps",
        eval_steps=3,
    )
    assert "checkpointing" in capsys.readouterr().err
    assert {line["step"] for line in metrics(output) if "eval_rouge-l" in line} == {3, 6}
    assert [line["step"] for line in metrics(output) if "test_rouge-l" in line] == [6]


@pytest.mark.fault(by_default=True)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(run: Run, tmp_path: Path) -> None:
    """M4: an absurd learning rate makes the second loss NaN; nothing of it is logged as a number."""
    with pytest.raises(RunStopped, match=r"the loss of step [2-6] is nan: lower training_args\.learning_rate"):
        run(peft=None, learning_rate=1e30, max_grad_norm=0, lr_scheduler_type="constant")
    assert all(line.get("loss") != 0.0 for line in metrics(tmp_path / "output"))


@pytest.mark.fault(by_default=True)
def test_a_loss_that_is_not_finite_may_only_warn(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """M4: the run goes on, and NaN stands in metrics.jsonl as null, never as 0.0."""
    output = run(
        peft=None,
        learning_rate=1e30,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        top={"on_nonfinite_loss": "warn"},
    )
    values = [line["loss"] for line in metrics(output) if "loss" in line]
    assert len(values) == 6
    assert None in values
    assert 0.0 not in values
    assert "is nan" in capsys.readouterr().err
