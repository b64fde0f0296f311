"""Values of the run configuration: types, choices and ranges (case C4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.errors import Problem
from tests.config.files import LORA, load, refused


# --- C4: types
@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),
        ("learning_rate: 5E-5", "learning_rate", 5e-5),
        ("learning_rate: '5e-5'", "learning_rate", 5e-5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("per_device_train_batch_size: '8'", "per_device_train_batch_size", 8),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 010", "max_steps", 10),
        ("save_steps: 500", "save_steps", 500),
        ("save_steps: 0.5", "save_steps", 0.5),
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: off", "save_strategy", "no"),
        ("save_strategy: false", "save_strategy", "no"),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("logging_strategy: no", "logging_strategy", "no"),
        ("bf16: yes", "bf16", True),
        ("bf16: on", "bf16", True),
        ("bf16: 'false'", "bf16", False),
        ("tf32: null", "tf32", None),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("run_name: 12:30", "run_name", "12:30"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: no", "run_name", "no"),
        ("run_name: 实验一", "run_name", "实验一"),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("report_to: tensorboard", "report_to", "tensorboard"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("lr_scheduler_kwargs: '{\"num_cycles\": 2}'", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("debug: underflow_overflow", "debug", ["underflow_overflow"]),
        ("deepspeed: {zero_optimization: {stage: 2}}", "deepspeed", {"zero_optimization": {"stage": 2}}),
        ("include_num_input_tokens_seen: no", "include_num_input_tokens_seen", False),
        ("fsdp: false", "fsdp", False),
        ("trackio_static_space_id: false", "trackio_static_space_id", False),
        ("optim_target_modules: attn", "optim_target_modules", "attn"),
    ],
)
def test_value_takes_its_declared_type(tmp_path: Path, written: str, key: str, value: Any) -> None:
    """C4: values are read by the type that the field declares."""
    read = load(tmp_path, written).training_args[key]
    assert read == value
    assert type(read) is type(value)


def test_lora_alpha_in_exponent_form_is_a_whole_number(tmp_path: Path) -> None:
    """C4: `lora_alpha: 3.2e1` is 32."""
    config = load(tmp_path, rest=LORA + "  lora_alpha: 3.2e1\n")
    assert config.peft_config is not None
    assert config.peft_config["lora_alpha"] == 32
    assert isinstance(config.peft_config["lora_alpha"], int)


@pytest.mark.parametrize(
    ("training", "what", "fix"),
    [
        ("learning_rate: fast", "`fast` is not a number", "write a number; the default is 5e-05"),
        ("learning_rate: .nan", "`.nan` is not a finite number", "write a number; the default is 5e-05"),
        ("learning_rate: -.inf", "`-.inf` is not a finite number", "write a number; the default is 5e-05"),
        ("learning_rate: 1e999", "`1e999` is not a finite number", "write a number; the default is 5e-05"),
        ("learning_rate: '1e999'", "`1e999` is not a finite number", "write a number"),
        ("learning_rate: null", "`null` is not a number", "leave the key out for its default, or write a number"),
        ("learning_rate:", "`null` is not a number", "leave the key out for its default, or write a number"),
        ("learning_rate: [1]", "`[1]` is not a number", "write a number; the default is 5e-05"),
        ("max_steps: true", "`true` is not a whole number", "write a whole number; the default is -1"),
        ("max_steps: 1.5", "`1.5` is not a whole number", "write a whole number; the default is -1"),
        ("bf16: 1", "`1` is not true or false", "write true or false; the default is false"),
        ("run_name: None", "`None` is a text in YAML", "write a text or null"),
        ("lr_scheduler_kwargs: {a: .nan}", "`.nan` is not a finite number", "write "),
        ("parallelism_config: {a: 1}", "takes a Python object, which a YAML file cannot write", "leave it out"),
    ],
)
def test_value_of_another_type_is_refused(tmp_path: Path, training: str, what: str, fix: str) -> None:
    """C4: `learning_rate: fast` and its like: refused naming field, value and what to write."""
    (problem,) = refused(tmp_path, training)
    assert problem.where.startswith("run.yaml:6: training_args.")
    assert problem.what == what
    assert problem.fix.startswith(fix)


@pytest.mark.parametrize(
    ("training", "rest", "hint"),
    [
        ("eval_strategy: step", "", "did you mean steps? write one of no, steps, epoch"),
        ("lr_scheduler_type: Cosine", "", "did you mean cosine?"),
        ("optim: adam_torch", "", "did you mean adamw_torch?"),
        ("log_level: warn", "", "did you mean warning?"),
        ("train_sampling_strategy: grouped", "", "random, sequential, group_by_length"),
        ("debug: underflow", "", "did you mean underflow_overflow?"),
        ("report_to: tensorbord", "", "did you mean tensorboard?"),
        ("", LORA + "  bias: lora\n", "did you mean lora_only?"),
        ("", LORA + "  init_lora_weights: pisa\n", "did you mean pissa?"),
        ("", "on_nonfinite_loss: ignore\n", "write one of stop, warn or null"),
    ],
)
def test_enumerated_value_is_checked(tmp_path: Path, training: str, rest: str, hint: str) -> None:
    """C4: a value that is not among the choices is refused with the nearest of them."""
    (problem,) = refused(tmp_path, training, rest)
    assert hint in problem.fix


def test_numbered_choice_is_accepted(tmp_path: Path) -> None:
    """C4: PEFT's `pissa_niter_[number of iters]` stands for any number."""
    config = load(tmp_path, rest=LORA + "  init_lora_weights: pissa_niter_16\n")
    assert config.peft_config is not None
    assert config.peft_config["init_lora_weights"] == "pissa_niter_16"


def test_nested_section_of_peft_is_checked(tmp_path: Path) -> None:
    """C4: PEFT's nested configs are typed too."""
    (problem,) = refused(tmp_path, rest=LORA + "  eva_config:\n    rhoo: 2.0\n")
    assert (problem.where, problem.fix) == ("run.yaml:10: peft_config.eva_config.rhoo", "did you mean rho?")


def test_duplicate_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    """C4: a key given twice is refused."""
    assert refused(tmp_path, "seed: 1\nmax_steps: 5\nseed: 2") == (
        Problem("run.yaml:8: training_args.seed", "`seed` is given twice, in lines 6 and 8", "keep one of them"),
    )


@pytest.mark.parametrize(
    ("training", "rest", "words"),
    [
        ("per_device_train_batch_size: 0", "", "is out of range: write a number at least 1"),
        ("gradient_accumulation_steps: 0", "", "is out of range: write a number at least 1"),
        ("max_steps: 0", "", "is out of range: write -1, or a number at least 1"),
        ("learning_rate: 0", "", "above 0"),
        ("warmup_steps: -0.1", "", "is out of range: write a number at least 0"),
        ("warmup_steps: 1.5", "", "neither a whole number of steps nor a fraction"),
        ("eval_steps: 0", "", "is out of range: write a number above 0"),
        ("save_steps: 10.5", "", "neither a whole number of steps nor a fraction"),
        ("seed: -1", "", "at least 0 and at most 4294967295"),
        ("generation_config: {max_new_tokens: 0}", "", "is out of range: write a number at least 1"),
        ("generation_config: {num_return_sequences: 2}", "", "at least 1 and at most 1"),
        ("", LORA + "  r: 0\n", "is out of range: write a number at least 1"),
        ("", LORA + "  lora_dropout: 1.0\n", "at least 0 and below 1"),
        (
            "",
            "peft_config: {peft_type: PREFIX_TUNING, num_virtual_tokens: 0}\n",
            "is out of range: write a number at least 1",
        ),
        ("", "max_input_length: 0\n", "is out of range: write a number at least 1"),
        ("", "max_output_length: -5\n", "is out of range: write a number at least 1"),
    ],
)
def test_number_out_of_range_is_refused(tmp_path: Path, training: str, rest: str, words: str) -> None:
    """C4: numbers that cannot work are refused with the range."""
    (problem,) = refused(tmp_path, training, rest)
    assert words in f"{problem.what}: {problem.fix}"


@pytest.mark.parametrize("number", ["null", "1", "4"])
def test_num_proc_may_be_null(tmp_path: Path, number: str) -> None:
    """C4: null means one process."""
    config = load(tmp_path, overrides=(f"data_config.num_proc={number}",))
    assert config.data_config.num_proc == (1 if number == "null" else int(number))


@pytest.mark.parametrize("written", ["1" + "0" * 400, str(2**63)])
def test_a_whole_number_beyond_64_bits_is_refused(tmp_path: Path, written: str) -> None:
    """C4: no library counts so far; PEFT would end in an OverflowError."""
    (problem,) = refused(tmp_path, f"max_steps: {written}")
    assert problem.what.endswith("has more than the 64 bits of a whole number")
