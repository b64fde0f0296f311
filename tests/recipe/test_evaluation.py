"""Whole runs on a tiny model: evaluation, predictions, the best model, saving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import (
    LORA,
    PREFIX,
    assert_same_bits,
    conversation,
    losses,
    metrics,
)

Run = Callable[..., Path]


def test_evaluation_is_the_same_for_every_batch_size(run: Run) -> None:
    """E2: rows of different length, alone and four at a time: same predictions, same metrics, eval_loss included."""
    shared: dict[str, Any] = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 6, "save_strategy": "no"}
    one = run("one", per_device_eval_batch_size=1, **shared)
    four = run("four", per_device_eval_batch_size=4, **shared)
    assert (one / "predictions/eval-6.jsonl").read_text("utf-8") == (four / "predictions/eval-6.jsonl").read_text(
        "utf-8"
    )
    keys = ("eval_rouge-1", "eval_rouge-2", "eval_rouge-l", "eval_bleu-4", "eval_exact-match")
    (first,), (second,) = ([line for line in metrics(output) if "eval_loss" in line] for output in (one, four))
    assert [first[key] for key in keys] == [second[key] for key in keys]
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=1e-5)


def test_a_prediction_is_written_for_each_assistant_turn_once(run: Run) -> None:
    """E4, E2: in the order of the file; the prompt is the true history, ends at the marker and holds no reference."""
    output = run(val="dev.jsonl", eval_strategy="steps", eval_steps=6)
    lines = [json.loads(line) for line in (output / "predictions/eval-6.jsonl").read_text("utf-8").splitlines()]
    expected = []
    for line, number in enumerate(range(20, 25), start=1):
        messages = conversation(number, turns=1 + number % 2)["messages"]
        expected += [(line, turn, messages[turn]["content"]) for turn in range(1, len(messages), 2)]
    assert [(line["line"], line["turn"], line["reference"]) for line in lines] == expected
    assert all(line["prompt"].endswith("<|assistant|>") for line in lines)
    first, second = (line["prompt"] for line in lines if line["line"] == 2)
    assert second.startswith(first + "\n" + lines[1]["reference"] + "<|user|>")
    names = {
        "file",
        "line",
        "turn",
        "prompt",
        "reference",
        "prediction",
        "rouge-1",
        "rouge-2",
        "rouge-l",
        "bleu-4",
        "exact-match",
    }
    assert {frozenset(line) for line in lines} == {frozenset(names)}


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_loss_of_the_dev_data_is_always_there(run: Run, generate: bool, strategy: str) -> None:
    """E3: with and without generation, by steps and by epochs."""
    output = run(
        val="dev.jsonl", predict_with_generate=generate, eval_strategy=strategy, eval_steps=3, save_strategy="no"
    )
    evaluations = [line for line in metrics(output) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == ([3, 6] if strategy == "steps" else [5, 6])
    assert all(("eval_bleu-4" in line) is generate for line in evaluations)


def test_without_dev_data_evaluation_is_off(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """C3: `val_file: null` beside `eval_strategy: steps`; training completes."""
    output = run(val=None, eval_strategy="steps", eval_steps=1)
    assert len(losses(output)) == 6
    assert [line for line in metrics(output) if "eval_loss" in line] == []
    assert "val_file" in capsys.readouterr().err


@pytest.mark.parametrize("peft", [LORA, PREFIX, None], ids=["lora", "prefix", "full"])
def test_the_best_adapter_is_the_one_that_is_kept(run: Run, peft: dict[str, Any] | None) -> None:
    """C8, T1: by rouge-l: the final folder equals the best checkpoint."""
    output = run(
        peft=peft,
        val="dev.jsonl",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rouge-l",
    )
    by_step = {line["step"]: line["eval_rouge-l"] for line in metrics(output) if "eval_rouge-l" in line}
    best = max(by_step, key=lambda step: (by_step[step], -step))
    assert_same_bits(output, output / f"checkpoint-{best}")


@pytest.fixture
def answers_apart(tmp_path: Path) -> Path:
    """Return data whose dev and test answers share no word with the training answers: they get worse step by step."""
    folder = tmp_path / "apart"
    folder.mkdir()
    for name, answer in (("train", "hello " * 8), ("dev", "今天天气很好。" * 4), ("test", "今天天气很好。" * 4)):
        messages = [{"role": "user", "content": "fine?"}, {"role": "assistant", "content": answer}]
        (folder / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    return folder


def test_the_test_data_is_scored_under_the_step_of_the_best_model(run: Run, answers_apart: Path) -> None:
    """C8: what is said of the model that is kept carries its step."""
    output = run(
        data_dir=answers_apart,
        val="dev.jsonl",
        test="test.jsonl",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        predict_with_generate=False,
    )
    assert [line["step"] for line in metrics(output) if "test_loss" in line] == [2]


def test_evaluation_that_is_switched_off_stays_off(run: Run) -> None:
    """E3: `eval_strategy: no` beside a `val_file`: no loss of the dev data, no predictions, also not at the end."""
    output = run(val="dev.jsonl", eval_strategy="no")
    assert [line for line in metrics(output) if "eval_loss" in line] == []
    assert not (output / "predictions").exists()


def test_the_best_checkpoint_survives_the_limit(run: Run, answers_apart: Path) -> None:
    """C8: `save_total_limit: 1` removes others, and the state names the best by its final path."""
    output = run(
        data_dir=answers_apart,
        val="dev.jsonl",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        predict_with_generate=False,
    )
    by_step = {line["step"]: line["eval_loss"] for line in metrics(output) if "eval_loss" in line}
    best = min(by_step, key=lambda step: by_step[step])
    assert best == 2
    assert (output / f"checkpoint-{best}").is_dir()
    assert_same_bits(output, output / f"checkpoint-{best}")


@pytest.mark.parametrize("peft", [LORA, None], ids=["lora", "full"])
def test_the_saved_folder_stops_by_itself(
    run: Run, tmp_path: Path, model_folder: Path, peft: dict[str, Any] | None
) -> None:
    """M3, R7: one row "hi" -> "yo" learned by heart; elsewhere, plain transformers and PEFT answer and stop."""
    data = tmp_path / "one"
    data.mkdir()
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    (data / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    everything = {**LORA, "lora_dropout": 0.0, "r": 16, "target_modules": "all-linear"} if peft else None
    output = run(
        "hi", everything, data_dir=data, max_steps=60, save_steps=60, learning_rate=3e-3 if peft is None else 2e-2
    )
    for folder in (output, output / "checkpoint-60"):
        moved = tmp_path / f"moved-{folder.name}"
        shutil.copytree(folder, moved)
        tokenizer: Any = AutoTokenizer.from_pretrained(moved)
        if peft is None:
            model: Any = AutoModelForCausalLM.from_pretrained(moved)
            assert model.config.use_cache is True
            written = json.loads((moved / "config.json").read_text(encoding="utf-8"))
            fields = {name: written[name] for name in ("rope_theta", "partial_rotary_factor", "torch_dtype")}
            assert fields == {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "torch_dtype": "float32"}
        else:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(moved))
        prompt = tokenizer("<|user|>\nhi<|assistant|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        new = model.generate(prompt, max_new_tokens=32, do_sample=False)[0, prompt.shape[1] :]
        assert tokenizer.decode(new) == "\nyo<|user|>"
