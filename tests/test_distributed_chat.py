"""Two real processes under torchrun against one, on a chat model: the same training, the same evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from glm_edge_ft.checks.pickles import check_pickles
from glm_edge_ft.checks.processes import PROCESSES_FILE, read_processes
from glm_edge_ft.errors import UserError
from tests.conftest import TokenizerMaker
from tests.launch import REPOSITORY, ZERO_2, ZERO_3, launch
from tests.model_folders import save_model_folder
from tests.runs import LORA, PREFIX, assert_close, assert_same_bits, do_run, losses, metrics, weights, write_chat_data

pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")

KINDS: dict[str, dict[str, Any] | None] = {"lora": {**LORA, "lora_dropout": 0.0}, "full": None, "prefix": PREFIX}
MODES: dict[str, dict[str, Any]] = {"ddp": {}, "zero2": {"deepspeed": ZERO_2}, "zero3": {"deepspeed": ZERO_3}}
SLOW = {("lora", "zero2"), ("full", "ddp"), ("full", "zero2"), ("prefix", "ddp"), ("prefix", "zero2")}
# Full fine-tuning of random weights: a step that is too long makes rounding errors grow.
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "save_steps": 4}

Runs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Iterator[Path]:
    """Give a folder with a tiny chat model, its data and the cache of all runs."""
    folder = tmp_path_factory.mktemp("distributed")
    save_model_folder(folder / "model", make_tokenizer("glm"))
    write_chat_data(folder / "data", train=20)  # whole batches alone: two processes fill up the last one
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        yield folder


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
                if (kind, mode) == ("lora", "zero3"):
                    settings["deepspeed"] = without_gathering()
                done[kind, mode] = launch(output, data, model, processes=2, peft=KINDS[kind], **settings)
        return done[kind, mode]

    return run


def without_gathering() -> dict[str, Any]:
    """Return the settings of ZeRO-3 without the key that makes DeepSpeed gather whole weights for saving."""
    settings: dict[str, Any] = json.loads(Path(ZERO_3).read_text(encoding="utf-8"))
    del settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    return settings


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=[pytest.mark.slow] if (kind, mode) in SLOW else [])
        for kind in KINDS
        for mode in MODES
    ],
)
def test_two_processes_train_the_model_of_one(runs: Runs, kind: str, mode: str) -> None:
    """T3, T1: the same global batch gives the same losses and weights; a prefix is saved under ZeRO-3 and all."""
    assert_close(runs(kind, "one"), runs(kind, mode))


def test_an_adapter_of_zero_3_loads_without_deepspeed(runs: Runs, folder: Path) -> None:
    """T4: with no key in the JSON that asks for whole weights."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, str(runs("lora", "zero3")))
    loaded = get_peft_model_state_dict(model)
    expected = weights(runs("lora", "one"))
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(loaded[name], values, rtol=0, atol=1e-4, msg=name)  # a step goes 1e-3


def test_a_finished_run_of_zero_3_is_evaluated(runs: Runs, folder: Path) -> None:
    """R4: with the weights of its last checkpoint, of which each process takes its share."""
    output = folder / "finished"
    shutil.copytree(runs("full", "zero3"), output)
    settings = {**TRAINING, "per_device_train_batch_size": 2, "deepspeed": ZERO_3, "test": "test.jsonl"}
    launch(output, folder / "data", folder / "model", processes=2, resume="yes", peft=None, **settings)
    assert_close(runs("full", "zero3"), output)
    again = folder / "evaluated"
    shutil.copytree(runs("full", "one"), again)
    do_run(again, folder / "data", folder / "model", peft=None, resume="yes", test="test.jsonl", **TRAINING)
    (expected,), (found,) = ([line for line in metrics(run) if "test_loss" in line] for run in (again, output))
    assert found["step"] == expected["step"] == 6
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy checkpoint 4 and the run's record, as if the run had been stopped there."""
    target.mkdir()
    shutil.copytree(source / "checkpoint-4", target / "checkpoint-4")
    shutil.copy(source / "run.json", target / "run.json")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("prefix", "zero3"),
        pytest.param("lora", "ddp", marks=pytest.mark.slow),
        *(pytest.param("full", mode, marks=pytest.mark.slow) for mode in ("zero2", "zero3")),
    ],
)
def test_two_processes_go_on_as_if_they_had_not_stopped(runs: Runs, folder: Path, kind: str, mode: str) -> None:
    """R3, T1: from checkpoint 4 to the same weights, bit for bit."""
    output = folder / f"resumed-{mode}-{kind}"
    copy_checkpoint(runs(kind, mode), output)
    settings = {**TRAINING, "per_device_train_batch_size": 2, **MODES[mode], "peft": KINDS[kind]}
    launch(output, folder / "data", folder / "model", processes=2, resume="yes", **settings)
    expected = losses(runs(kind, mode))
    assert losses(output) == {step: expected[step] for step in (5, 6)}
    assert_same_bits(runs(kind, mode), output)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind"), [("zero2", "lora"), ("zero2", "full"), ("zero3", "lora"), ("zero3", "full")])
def test_a_run_in_bf16_goes_on_as_if_never_interrupted(folder: Path, mode: str, kind: str) -> None:
    """R1, R3: DeepSpeed keeps other files then, `bf16_zero_*`; what their pickles call is known."""
    whole, resumed = (folder / f"{name}-bf16-{mode}-{kind}" for name in ("whole", "resumed"))
    settings = {**TRAINING, "bf16": True, "per_device_train_batch_size": 2, **MODES[mode], "peft": KINDS[kind]}
    launch(whole, folder / "data", folder / "model", processes=2, **settings)
    assert list(whole.glob("checkpoint-4/global_step4/bf16_zero_*"))
    assert check_pickles(whole / "checkpoint-4") == []
    copy_checkpoint(whole, resumed)
    launch(resumed, folder / "data", folder / "model", processes=2, resume="yes", **settings)
    assert losses(resumed) == {step: losses(whole)[step] for step in (5, 6)}
    assert_same_bits(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "processes"), [("ds_zero_2_offload.json", 1), ("ds_zero_3_offload.json", 2)])
def test_a_run_with_offloaded_states_is_the_same_and_goes_on(
    runs: Runs, folder: Path, file: str, processes: int
) -> None:
    """T3, R3: with DeepSpeed's AdamW for the CPU."""
    output, resumed = (folder / f"{name}-{file}-{processes}" for name in ("offloaded", "resumed"))
    settings = {**TRAINING, "per_device_train_batch_size": 4 // processes, "peft": None}
    settings["deepspeed"] = str(REPOSITORY / "configs" / file)
    launch(output, folder / "data", folder / "model", processes=processes, **settings)
    assert_close(runs("full", "one"), output)
    copy_checkpoint(output, resumed)
    launch(resumed, folder / "data", folder / "model", processes=processes, resume="yes", **settings)
    assert_same_bits(output, resumed)


@pytest.mark.parametrize("mode", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
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
        assert losses(runs("lora", "ddp"))[step][0] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("mode", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_checkpoint_of_deepspeed_does_not_go_on_without_it(runs: Runs, folder: Path, mode: str) -> None:
    """R5: refused before the weights; transformers would go on with a new optimizer and say nothing."""
    output = folder / f"without-{mode}"
    copy_checkpoint(runs("lora", mode), output)
    settings = {**TRAINING, "per_device_train_batch_size": 2}
    with pytest.raises(UserError, match=f"2 processes with ZeRO-{mode[-1]}, this run works without DeepSpeed"):
        do_run(output, folder / "data", folder / "model", peft=KINDS["lora"], resume="yes", **settings)


def test_deepspeed_works_in_one_process_that_torchrun_did_not_start(runs: Runs, folder: Path) -> None:
    """T3: `python finetune.py` with a DeepSpeed file."""
    settings = {**TRAINING, "deepspeed": ZERO_2}
    alone = launch(folder / "alone", folder / "data", folder / "model", peft=KINDS["lora"], **settings)
    assert_close(runs("lora", "one"), alone)


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_replies_of_very_different_length_are_counted_once(folder: Path, mode: str) -> None:
    """T6: two processes, three rows each of dev and test data; the same files and metrics as one process gives."""
    data = folder / "lengths"
    if not data.exists():
        data.mkdir()
        (data / "train.jsonl").write_text((folder / "data" / "train.jsonl").read_text(encoding="utf-8"))
        questions = ("hello", "你好", "帮我写一个很长的故事，至少一百个字")
        lines = []
        for number, text in enumerate(questions):
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "fine " * 7**number}]
            lines.append(json.dumps({"messages": messages}) + "\n")
        for name in ("dev", "test"):
            (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings: dict[str, Any] = {
        **{"max_steps": 1, "learning_rate": 1e-6, "save_strategy": "no", "val": "dev.jsonl", "test": "test.jsonl"},
        **{"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1},
        **{"predict_with_generate": True, "generation_config": {"max_new_tokens": 96}, "peft": KINDS["lora"]},
    }
    one = folder / "one-lengths"
    if not one.exists():
        do_run(one, data, "glm-edge-nano", **settings)
    settings = {**settings, **MODES[mode], "per_device_train_batch_size": 2}
    two = launch(folder / f"{mode}-lengths", data, "glm-edge-nano", processes=2, **settings)
    for split, name in (("eval", "dev"), ("test", "test")):
        expected, found = ((run / "predictions" / f"{split}-1.jsonl").read_text(encoding="utf-8") for run in (one, two))
        assert found == expected, name
        lengths = [len(json.loads(line)["prediction"]) for line in expected.splitlines()]
        assert len(lengths) == 3
        assert max(lengths) > 3 * min(lengths)
        (before,), (after,) = ([line for line in metrics(run) if f"{split}_loss" in line] for run in (one, two))
        for metric in ("loss", "rouge-1", "rouge-l", "bleu-4"):
            assert after[f"{split}_{metric}"] == pytest.approx(before[f"{split}_{metric}"], rel=1e-4), metric
