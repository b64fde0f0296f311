"""Whole runs on a base model in 4 bits, and what is done with their adapters afterwards."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from glm_edge_ft.deploy.evaluate import evaluate
from glm_edge_ft.deploy.export_gguf import export_gguf
from glm_edge_ft.deploy.merge import merge
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.precision import detect_hardware
from tests.conftest import TokenizerMaker
from tests.deploy.gguf_files import model_key, read_gguf
from tests.launch import start
from tests.model_folders import save_model_folder
from tests.runs import (
    LORA,
    PREFIX,
    assert_close,
    assert_same_bits,
    do_run,
    losses,
    metrics,
    predictions,
    weights,
    write_chat_data,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

Run = Callable[..., Path]
NF4 = {"quantization": "nf4"}
STEPS = 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep encoded data out of the user's cache."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return the folder of a tiny model all of whose linear layers can be in 4 bits."""
    return save_model_folder(tmp_path_factory.mktemp("model"), make_tokenizer("glm"), intermediate_size=128)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data folder."""
    return write_chat_data(tmp_path / "data")


@pytest.fixture
def run(tmp_path: Path, data: Path, model_folder: Path) -> Run:
    """Return a function that does one run in this process and returns its output folder."""

    def start_run(
        output: str = "output",
        peft: Mapping[str, Any] | None = LORA,
        top: Mapping[str, Any] = NF4,
        model: Path | str = model_folder,
        **settings: Any,
    ) -> Path:
        return do_run(tmp_path / output, data, model, peft=peft, top=top, **settings)

    return start_run


def resume_from_4(run: Run, whole: Path, **settings: Any) -> Path:
    """Go on in a folder of its own from the fourth step of a run."""
    (whole.parent / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-4", whole.parent / "resumed" / "checkpoint-4")
    return run("resumed", resume="yes", save_steps=4, **settings)


@pytest.mark.parametrize("peft", [LORA, PREFIX], ids=["lora", "prefix"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run: Run, peft: dict[str, Any]) -> None:
    """R3: 6 steps at once, with dropout and an evaluation by generated replies in between, against 4 and 2."""
    settings: dict[str, Any] = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 2}
    whole = run("whole", peft, save_steps=4, **settings)
    resumed = resume_from_4(run, whole, peft=peft, **settings)
    assert losses(resumed) == {step: line for step, line in losses(whole).items() if step > 4}
    assert_same_bits(whole, resumed)
    assert {line["step"] for line in metrics(whole) if "eval_rouge-l" in line} == {2, 4, 6}


def test_evaluation_does_not_change_training(run: Run) -> None:
    """Neither the weights nor the way in which gradients come back."""
    without = run("without", activation_checkpointing=True)
    settings: dict[str, Any] = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    between = run("between", activation_checkpointing=True, **settings)
    assert losses(between) == losses(without)
    assert_same_bits(without, between)
    assert [name for name, values in weights(without).items() if "lora_B" in name and values.abs().sum() == 0] == []


@pytest.mark.skipif(not detect_hardware().cpu_has_bf16, reason="this CPU has no bfloat16 instructions")
def test_in_16_bit_the_adapter_is_in_float32_and_a_resumed_run_goes_on(run: Run) -> None:
    """R3, C7: bfloat16 for what is computed; evaluated, resumed and saved so."""
    settings: dict[str, Any] = {"bf16": True, "val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 2}
    whole = run("whole", save_steps=4, **settings)
    resumed = resume_from_4(run, whole, **settings)
    assert sorted(losses(resumed)) == [5, 6]
    for step, (loss, *_) in losses(resumed).items():
        assert loss == pytest.approx(losses(whole)[step][0], abs=1e-2)
    assert {values.dtype for values in weights(whole).values()} == {torch.float32}
    assert any(torch.count_nonzero(values - values.bfloat16().float()) for values in weights(whole).values())


def test_batches_without_padding_train_as_padded_ones(run: Run) -> None:
    """T3: the same losses and weights, rows of different length one behind another."""
    settings: dict[str, Any] = {"peft": {**LORA, "lora_dropout": 0.0}, "max_steps": 3, "learning_rate": 1e-4}
    padded = run("padded", **settings)
    packed = run("packed", top={**NF4, "padding_free": True}, **settings)
    assert_close(padded, packed)


def test_the_run_says_and_records_what_is_in_4_bits(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The count of weights, and an estimate that is smaller by them, to the byte."""
    output, plain = run(max_steps=1), run("plain", top={}, max_steps=1)
    record, other = (json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in (output, plain))
    assert (record["config"]["quantization"], other["config"]["quantization"]) == ("nf4", None)
    assert record["model_fingerprint"] == other["model_fingerprint"]
    # two layers of q and o (64 x 64), k and v (32 x 64), gate_up (256 x 64), down (64 x 128)
    count = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 256 * 64 + 64 * 128)
    assert record["facts"]["quantized_parameters"] == count
    assert f", {count:,} parameters in 4 bits" in capsys.readouterr().out
    saved = other["facts"]["memory_bytes"]["weights"] - record["facts"]["memory_bytes"]["weights"]
    scales = count // 64 + 2 * 6 * 4  # a byte a block, four bytes for at most 256 of them, of twelve layers
    tables = 12 * 4 * (16 + 256 + 1)
    assert saved == 4 * count - count // 2 - scales - tables


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Return the output folder of a run with predictions on its test file, beside its data."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        data = write_chat_data(folder / "data")
        peft = {**LORA, "r": 16, "target_modules": "all-linear"}
        settings: dict[str, Any] = {"peft": peft, "top": NF4, "test": "test.jsonl", "learning_rate": 1e-2}
        settings |= {"max_steps": STEPS, "save_steps": STEPS}
        return do_run(folder / "output", data, model_folder, **settings)


def replies(folder: Path, name: str) -> list[str]:
    """Return the replies in a file of predictions."""
    return [line["prediction"] for line in predictions(folder, name)]


def test_the_adapter_loads_with_peft_alone_and_says_the_same(trained: Path, model_folder: Path) -> None:
    """R7: transformers' own 4-bit loading and PEFT, no line of this project."""
    from bitsandbytes.nn import Linear4bit

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=settings, dtype=torch.float32)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # or it would go on with scales in bfloat16
    model = PeftModel.from_pretrained(base, str(trained)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(trained)
    row = predictions(trained, f"test-{STEPS}")[0]
    prompt = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    new = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).removeprefix("\n") == row["prediction"]


def test_evaluate_measures_the_model_that_was_trained(trained: Path, model_folder: Path, tmp_path: Path) -> None:
    """E5: in 4 bits, as the record says, to the last digit of the run's own evaluation; a whole model as it is."""
    file = trained.parent / "data" / "test.jsonl"
    evaluate(file, (str(trained), str(model_folder)), tmp_path / "out")
    (found, base), (logged,) = metrics(tmp_path / "out"), [line for line in metrics(trained) if "test_loss" in line]
    for name in ("loss", "rouge-l", "bleu-4"):
        assert found[f"test_{name}"] == logged[f"test_{name}"], name
    evaluate(file, (str(trained),), tmp_path / "plain", overrides=("quantization=null",))
    (plain,) = metrics(tmp_path / "plain")
    assert 1e-4 < abs(plain["test_loss"] - found["test_loss"]) < 0.5
    evaluate(file, (str(model_folder),), tmp_path / "alone")
    assert metrics(tmp_path / "alone")[0]["test_loss"] == pytest.approx(base["test_loss"], rel=1e-5)


def test_without_bitsandbytes_the_base_is_used_as_plain_numbers_with_a_notice(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run, its check, and a merge are refused with what to install; Python is told that there is none."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    file = trained.parent / "data" / "test.jsonl"
    evaluate(file, (str(trained),), tmp_path / "out")
    assert "the base model is used unquantized" in capsys.readouterr().err
    for check in (True, False):
        with pytest.raises(UserError) as caught:
            do_run(tmp_path / "run", trained.parent / "data", "glm-edge-nano", top=NF4, check=check)
        (problem,) = caught.value.problems
        assert problem.where == "quantization"
        assert problem.what == "is nf4, and bitsandbytes is not installed"
        assert problem.fix.startswith("pip install bitsandbytes==")
    with pytest.raises(UserError, match=r"in 4 bits when it was trained, and bitsandbytes is not installed"):
        merge(str(trained), tmp_path / "merged")


def expected_merge(trained: Path, model_folder: Path) -> dict[str, torch.Tensor]:
    """Return each weight as bitsandbytes' own plain numbers plus the adapter's product, computed apart."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized: Any = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=settings)
    numbers = dict(quantized.dequantize(torch.float32).named_parameters())
    adapter = load_file(trained / "adapter_model.safetensors")
    written = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    expected = {}
    for name, values in numbers.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected[name] = values.detach().float()
        if f"{prefix}.lora_A.weight" in adapter:
            change = adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
            expected[name] = expected[name] + change * written["lora_alpha"] / written["r"]
    return expected


def test_the_merged_model_is_the_adapter_on_the_numbers_of_its_run(
    trained: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E5: to 1e-6, as a folder and as a GGUF file; a plain model, which says what the run said."""
    expected = expected_merge(trained, model_folder)
    merge(str(trained), tmp_path / "merged", dtype="float32")
    assert "was in 4 bits when the adapter was trained" in capsys.readouterr().err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, values in merged.items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6, msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    evaluate(trained.parent / "data" / "test.jsonl", (str(tmp_path / "merged"),), tmp_path / "out")
    assert replies(tmp_path / "out", "merged") == replies(trained, f"test-{STEPS}")
    export_gguf(str(trained), tmp_path / "model.gguf", kind="f32")
    for name, values in read_gguf(tmp_path / "model.gguf").tensors.items():
        if "mlp" in model_key(name) or "o_proj" in model_key(name):  # the format turns rows of q and k
            torch.testing.assert_close(values, expected[model_key(name)], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("before", "after"), [(NF4, {}), ({}, NF4)])
def test_going_on_with_another_base_is_refused_with_both_values(
    run: Run, before: dict[str, str], after: dict[str, str]
) -> None:
    """R5: the adapter was fitted to other numbers."""
    run(max_steps=2, top=before)
    now, then = (top.get("quantization", "none") for top in (after, before))
    with pytest.raises(UserError, match=rf"quantization: {now}, but .*checkpoint-2 was trained with {then}"):
        run(max_steps=4, top=after, resume="yes")


def test_a_base_that_is_stored_in_4_bits_trains_with_and_without_the_key(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    """The same run either way; without adapter it is refused before its weights are read."""
    stored = tmp_path / "stored"
    shutil.copytree(model_folder, stored)
    (stored / "model.safetensors").unlink()
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=settings).save_pretrained(stored)
    on_the_fly = run("quantized", max_steps=3)
    for name, top in (("with", NF4), ("without", {})):
        output = run(name, top=top, model=stored, max_steps=3)
        assert losses(output) == losses(on_the_fly)
        assert_same_bits(output, on_the_fly)
    with pytest.raises(UserError, match="is stored in 4 bits, and such weights cannot be trained"):
        run("full", peft=None, top={}, model=stored)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, "ds_zero_2.json"], ids=["ddp", "zero 2"])
def test_two_processes_train_as_one(data: Path, model_folder: Path, tmp_path: Path, deepspeed: str | None) -> None:
    """T5: two processes with half the batch each, by averaging and under ZeRO-2."""
    shared: dict[str, Any] = {
        "peft": {**LORA, "lora_dropout": 0.0},
        "top": NF4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
    }
    one = do_run(tmp_path / "one", data, model_folder, **shared)
    if deepspeed is not None:
        pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
        shared["deepspeed"] = str(Path(__file__).resolve().parents[1] / "configs" / deepspeed)
    shared["per_device_train_batch_size"] = 2
    start(tmp_path / "two", data, model_folder, processes=2, **shared).end()
    assert_close(one, tmp_path / "two")
