"""Whole runs whose training batches have no padding, against the same runs with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, MistralForCausalLM, Seq2SeqTrainingArguments

from glm_edge_ft.checks.arguments import check_batches
from glm_edge_ft.errors import UserError
from glm_edge_ft.training.trainer import GlmEdgeTrainer
from tests.conftest import TokenizerMaker
from tests.launch import ZERO_2, ZERO_3, launch
from tests.runs import LORA, assert_close, assert_same_bits, do_run, losses

Run = Callable[..., Path]
STEADY = LORA | {"lora_dropout": 0.0}
EVALUATED = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 6}
PACKED = {"padding_free": True}


@pytest.fixture
def chat(chat_folder: Path) -> Run:
    """Return a function that does one chat run in this process and returns its output folder."""
    return lambda output, **options: do_run(
        chat_folder / output, chat_folder / "data", chat_folder / "model", **options
    )


@pytest.fixture
def vision(tmp_path: Path, vision_model: Path, vision_data: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that does one vision run in this process and returns its output folder."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    return lambda output, **options: do_run(tmp_path / output, vision_data, vision_model, takes_images=True, **options)


@pytest.mark.parametrize(
    ("peft", "settings"),
    [
        (STEADY, {}),
        (None, {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2}),
        (None, {"activation_checkpointing": True, "top": {"max_tokens_per_pass": 60}}),
        (None, {"per_device_train_batch_size": 1, "label_smoothing_factor": 0.1}),
    ],
    ids=["lora", "accumulated", "parts", "one row"],
)
def test_a_chat_run_learns_the_same_without_padding(chat: Run, peft: dict[str, Any] | None, settings: Any) -> None:
    """T3: losses, norms, evaluations and weights of six steps over two epochs."""
    top = settings.pop("top", {})
    options = {"peft": peft, "learning_rate": 1e-4, **EVALUATED, **settings}
    padded = chat("padded", top=top, **options)
    assert_close(padded, chat("packed", top=top | PACKED, **options))


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "trained"])
def test_a_vision_run_learns_the_same_without_padding(vision: Run, freeze: bool) -> None:
    """T3, I1: rows with images and without; with kept vectors of images and with the vision part at work."""
    options = {"peft": STEADY if freeze else None, "learning_rate": 1e-4, "dataloader_num_workers": 1, **EVALUATED}
    top = {"freezeV": freeze, "max_tokens_per_pass": 100}
    assert_close(vision("padded", top=top, **options), vision("packed", top=top | PACKED, **options))


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(chat: Run) -> None:
    """R3: 6 steps at once against 4 and a resume to 6, with dropout."""
    whole = chat("whole", top=PACKED, save_steps=4)
    (whole.parent / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-4", whole.parent / "resumed" / "checkpoint-4")
    resumed = chat("resumed", top=PACKED, resume="yes")
    assert_same_bits(whole, resumed)
    assert losses(resumed)[6] == losses(whole)[6]


def test_a_run_may_go_on_with_padding_and_says_so(chat: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """R3: no part of a checkpoint depends on it."""
    chat("output", top=PACKED, max_steps=2)
    capsys.readouterr()
    chat("output", max_steps=4, resume="yes")
    said = capsys.readouterr()
    text = "padding_free true -> false since the checkpoint was written: the same gradients, but not the same bits"
    assert text in said.out + said.err
    assert "attention: sdpa\n" in said.out


def test_the_run_says_how_attention_is_computed(chat: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved model is as any other: nothing of it says how it was trained."""
    output = chat("output", peft=None, top=PACKED, max_steps=2)
    assert "attention: sdpa, row by row\n" in capsys.readouterr().out
    assert "packed" not in (output / "config.json").read_text(encoding="utf-8")


def test_every_token_is_counted_and_no_padding(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tokens_per_second` divides by its time is what the padded run has, whose batches have a mask."""
    counted: list[int] = []
    log = GlmEdgeTrainer.log

    def noting(self: GlmEdgeTrainer, logs: dict[str, float], *args: Any) -> None:
        counted.append(self._tokens_since_log)
        log(self, logs, *args)

    monkeypatch.setattr(GlmEdgeTrainer, "log", noting)
    settings = {"max_steps": 3, "train_sampling_strategy": "random", "save_strategy": "no"}
    chat("padded", **settings)
    padded = counted.copy()
    counted.clear()
    chat("packed", top=PACKED, **settings)
    assert counted == padded
    assert min(padded[:3]) > 0


def test_a_model_whose_rows_would_mix_is_refused_before_the_weights(
    chat: Run, chat_folder: Path, make_tokenizer: TokenizerMaker
) -> None:
    """C4: a sliding window does not end at the beginning of a row."""
    shutil.rmtree(chat_folder / "model")
    tokenizer = make_tokenizer("glm")
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=16,
    )
    MistralForCausalLM(config).save_pretrained(chat_folder / "model")
    tokenizer.save_pretrained(chat_folder / "model")
    with pytest.raises(UserError, match=r"padding_free: true, but .*sliding"):
        chat("output", top=PACKED)


def test_what_would_cut_a_packed_batch_is_refused(tmp_path: Path) -> None:
    """T3: batches dispatched by one process."""
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), accelerator_config={"dispatch_batches": True})
    with pytest.raises(UserError, match=r"training_args\.accelerator_config: dispatch_batches"):
        check_batches(args, padding_free=True)
    check_batches(Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True), padding_free=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
def test_two_processes_train_the_model_of_one(chat_folder: Path, mode: str) -> None:
    """T5: each with packed batches of its own; full steps alone, since two processes fill up the last of an epoch."""
    if mode != "ddp":
        pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    data, model = chat_folder / "data", chat_folder / "model"
    settings: dict[str, Any] = {
        "peft": STEADY,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "random",
        "save_strategy": "no",
    }
    one = launch(chat_folder / "one", data, model, per_device_train_batch_size=4, **settings)
    sharing: dict[str, Any] = {"ddp": {}, "zero2": {"deepspeed": ZERO_2}, "zero3": {"deepspeed": ZERO_3}}[mode]
    two = launch(
        chat_folder / "two", data, model, processes=2, per_device_train_batch_size=2, top=PACKED, **settings, **sharing
    )
    assert_close(one, two)


@pytest.mark.slow
def test_two_processes_train_the_vision_model_of_one(tmp_path: Path, vision_model: Path, vision_data: Path) -> None:
    """T5, I1: packed, where one process has no image in its batch."""
    settings: dict[str, Any] = {
        "peft": None,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "random",
        "save_strategy": "no",
        "script": "finetune_vision.py",
    }
    one = launch(tmp_path / "one", vision_data, vision_model, per_device_train_batch_size=2, **settings)
    two = launch(
        tmp_path / "two",
        vision_data,
        vision_model,
        processes=2,
        per_device_train_batch_size=1,
        top=PACKED,
        **settings,
    )
    assert_close(one, two)
