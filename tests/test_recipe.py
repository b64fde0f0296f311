"""Whole runs on a tiny model: resuming, accumulation, evaluation, saving, each against an exact expectation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_edge_ft.errors import RunStopped, UserError
from glm_edge_ft.model.precision import look_at_machine
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder
from tests.runs import (
    LORA,
    PREFIX,
    assert_close,
    assert_same_bits,
    conversation,
    do_run,
    losses,
    metrics,
    weights,
    write_chat_data,
)

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return the folder of a tiny model."""
    return save_model_folder(tmp_path_factory.mktemp("model"), make_tokenizer("glm"))


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that does one run in this process and returns its output folder."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    data = write_chat_data(tmp_path / "data")

    def start(
        output: str = "output",
        peft: Mapping[str, Any] | None = LORA,
        resume: str | None = None,
        val: str | None = None,
        test: str | None = None,
        model: Path = model_folder,
        data_dir: Path = data,
        top: Mapping[str, Any] | None = None,
        **training_args: Any,
    ) -> Path:
        return do_run(
            tmp_path / output,
            data_dir,
            model,
            peft=peft,
            resume=resume,
            val=val,
            test=test,
            top=top,
            **training_args,
        )

    return start


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


@pytest.mark.skipif(not look_at_machine().cpu_has_bf16, reason="this CPU has no bfloat16 instructions")
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


def test_dropped_rows_are_said_by_the_run_itself(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """M2: dropped, counted and named, also when the data comes from the cache."""
    rows = [conversation(number) for number in range(4)]
    rows[2]["messages"].insert(0, {"role": "system", "content": "hello there my friend " * 20})
    data = tmp_path / "with-system"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for _ in range(2):
        run(max_steps=1, save_strategy="no", data_dir=data, top={"max_input_length": 40, "max_output_length": 8})
        assert "train: 1 rows dropped: train.jsonl:3: " in capsys.readouterr().err


def test_a_run_never_writes_over_a_model_that_is_not_its_own(run: Run, tmp_path: Path, model_folder: Path) -> None:
    """The output folder is MODEL itself, or above it, or holds another model, or is the data folder."""
    copy = tmp_path / "models" / "mine"
    shutil.copytree(model_folder, copy)
    for output, message in (
        (copy, "holds MODEL"),
        (copy.parent, "holds MODEL"),
        (tmp_path / "data", "is DATA_DIR"),
    ):
        with pytest.raises(UserError, match=f"training_args.output_dir: .* {message}"):
            run(model=copy, output_dir=str(output))
    with pytest.raises(UserError, match="holds a model that no run of this toolkit left there"):
        run(output_dir=str(copy))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be made or written to"):
        run(output_dir=str(tmp_path / "file" / "below"))


def test_settings_that_only_the_trainer_would_miss_are_refused_before_the_weights(run: Run) -> None:
    """Optimizer, schedule and reporting are built once for one parameter; all of them are listed."""
    with pytest.raises(UserError) as caught:
        run(optim="schedule_free_adamw", lr_scheduler_type="cosine_with_min_lr", report_to="wandb")
    assert [problem.where for problem in caught.value.problems] == [
        "training_args.optim",
        "training_args.lr_scheduler_type",
        "training_args.report_to",
    ]


def test_a_fresh_start_sets_the_earlier_run_aside(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """R2: `no` starts afresh, and nothing is written over."""
    output = run(max_steps=2)
    old = weights(output)
    run(max_steps=2, resume="no", learning_rate=5e-2)
    earlier = output / "earlier" / "1"
    assert f"it now lies in {earlier}" in capsys.readouterr().err
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


def test_freezing_the_vision_tower_of_a_chat_model_is_said_to_mean_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """I6: `freezeV: true` in the chat script."""
    output = run(max_steps=1, save_strategy="no", top={"freezeV": True})
    assert "freezeV: true has no meaning here" in capsys.readouterr().err
    assert len(losses(output)) == 1


def test_more_loader_processes_than_cores_are_clamped(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """T7: `dataloader_num_workers: 1000`, with a notice."""
    output = run(max_steps=1, save_strategy="no", dataloader_num_workers=1000)
    assert "dataloader_num_workers 1000 -> " in capsys.readouterr().err
    assert len(losses(output)) == 1


def test_the_run_record_and_the_curve_are_written(run: Run) -> None:
    """`run.json` holds the resolved config, versions and data fingerprint; `loss.png` is a picture."""
    output = run(val="dev.jsonl", eval_strategy="steps", eval_steps=3)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["training_args"]["learning_rate"] == 0.01
    assert record["versions"]["transformers"]
    assert len(record["data"]["train"]["fingerprint"]) == 32
    assert (output / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(output.rglob("training_args.bin"))
    assert not list(output.rglob("README.md"))
    assert not (output / ".saving").exists()


def test_modules_that_do_not_exist_are_refused_before_the_weights_are_read(run: Run) -> None:
    """A LoRA config for another model: the real names are listed."""
    with pytest.raises(UserError, match=r"no module named 'query_key_value'(.|\n)*it has: down_proj"):
        run(peft={**LORA, "target_modules": ["query_key_value"]})


def test_rows_longer_than_the_model_takes_are_refused(run: Run, tmp_path: Path, model_folder: Path) -> None:
    """The limit of the checkpoint's config, before any weight is read."""
    short = tmp_path / "short"
    shutil.copytree(model_folder, short)
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}), encoding="utf-8")
    with pytest.raises(UserError, match=r"its longest row has \d+ tokens, the model takes 16"):
        run(model=short)


def test_nothing_asks_for_a_login(run: Run) -> None:
    """E6: reporting is off unless the config names a service."""
    output = run(max_steps=1, save_strategy="no")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["training_args"]["report_to"] in ("none", [], ["none"])


def test_tensorboard_works_with_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`report_to: tensorboard` writes what metrics.jsonl has, read back as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    output = run(max_steps=2, report_to="tensorboard", save_strategy="no")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx({step: loss for step, (loss, _, _) in losses(output).items()})
    assert list(shown) == [1, 2]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(events.Tags()["scalars"])
