"""`quantization: nf4`: what it may stand beside, and what a tired user writes instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.config.files import LORA, load, refused

NF4 = "quantization: nf4\n"
PREFIX = "peft_config:\n  peft_type: PREFIX_TUNING\n  num_virtual_tokens: 4\n"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (NF4, "nf4"),
        ("quantization: 'nf4'", "nf4"),
        ("quantization: none", None),
        ("quantization: null", None),
        ("", None),
    ],
)
def test_the_base_model_is_quantized_on_request_only(tmp_path: Path, line: str, value: str | None) -> None:
    """Beside an adapter; `none` and null are as good as nothing, and the record says which it was."""
    config = load(tmp_path, rest=line + "\n" + LORA)
    assert config.quantization == value
    assert config.resolved()["quantization"] == value
    assert load(tmp_path, rest=LORA, overrides=("quantization=nf4",)).quantization == "nf4"
    assert load(tmp_path, rest=NF4 + PREFIX).quantization == "nf4"


@pytest.mark.parametrize("value", ["int4", "nf4x", "true", "4", "'nf4 '", "fp4", "int8", "[nf4]", "false"])
def test_another_value_is_refused_with_those_that_are_taken(tmp_path: Path, value: str) -> None:
    """C4: with the nearest of them where one is near."""
    (problem,) = refused(tmp_path, rest=f"quantization: {value}\n{LORA}")
    assert problem.where == "run.yaml:7: quantization"
    assert "write one of nf4, none or null" in problem.fix
    assert ("did you mean nf4?" in problem.fix) is (value in ("nf4x", "'nf4 '", "fp4"))


@pytest.mark.parametrize(
    "line", ["load_in_4bit: true", "quantization_bit: 4", "quantization_config: {load_in_4bit: true}"]
)
def test_the_keys_of_other_tools_are_answered_with_this_one(tmp_path: Path, line: str) -> None:
    """C4: three spellings of the same wish."""
    (problem,) = refused(tmp_path, rest=f"{line}\n{LORA}")
    assert "is not a key of this toolkit" in problem.what
    assert problem.fix.startswith("write quantization: nf4")


def test_everything_that_contradicts_it_is_listed_at_once(tmp_path: Path) -> None:
    """No adapter, or one that reads the weights, and ZeRO-3: each with its reason and the way out."""
    (problem,) = refused(tmp_path, rest=NF4)
    assert problem.where == "run.yaml:7: quantization"
    assert problem.what == "weights in 4 bits cannot be trained, and without peft_config all of them are"
    assert "peft_type: LORA" in problem.fix
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    rest = NF4 + LORA + "  init_lora_weights: pissa_niter_4\n  kasa_config: {}\n"
    problems = refused(tmp_path, "deepspeed: zero.json", rest)
    assert [problem.where for problem in problems] == [
        "run.yaml:6: training_args.deepspeed",
        "run.yaml:10: peft_config.init_lora_weights",
        "run.yaml:11: peft_config.kasa_config",
    ]
    assert "stage 3" in problems[0].what
    assert "ds_zero_2.json" in problems[0].fix
    assert problems[1].what == "`pissa_niter_4` needs unquantized weights"
    without = refused(tmp_path, "deepspeed: zero.json", rest.replace("nf4", "int4"))
    assert [problem.where for problem in without] == ["run.yaml:7: quantization"]


@pytest.mark.parametrize("beginning", ["true", "false", "gaussian"])
def test_beginnings_that_leave_the_weights_alone_are_taken(tmp_path: Path, beginning: str) -> None:
    """PEFT's own default among them."""
    assert load(tmp_path, rest=f"{NF4}{LORA}  init_lora_weights: {beginning}\n").quantization == "nf4"


@pytest.mark.parametrize("beginning", ["pissa", "olora", "loftq", "orthogonal", "mica"])
def test_beginnings_that_take_the_weights_apart_are_refused(tmp_path: Path, beginning: str) -> None:
    """Only beside 4-bit weights."""
    (problem,) = refused(tmp_path, rest=f"{NF4}{LORA}  init_lora_weights: {beginning}\n")
    assert problem.where == "run.yaml:10: peft_config.init_lora_weights"
    load(tmp_path, rest=f"{LORA}  init_lora_weights: {beginning}\n")
