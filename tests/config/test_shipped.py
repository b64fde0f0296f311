"""The shipped YAML files load, state every key of the guide, and are accepted by the real libraries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from glm_edge_ft.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = ("lora.yaml", "prefix.yaml", "sft.yaml", "demo.yaml")
GUIDE_KEYS = (
    *("train_file", "val_file", "test_file", "num_proc", "max_input_length", "max_output_length", "freezeV"),
    *("output_dir", "max_steps", "per_device_train_batch_size", "dataloader_num_workers", "remove_unused_columns"),
    *("save_strategy", "save_steps", "log_level", "logging_strategy", "logging_steps", "per_device_eval_batch_size"),
    *("eval_strategy", "eval_steps", "predict_with_generate", "generation_config", "max_new_tokens", "deepspeed"),
    *("peft_config", "peft_type", "task_type"),
)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_loads_without_a_notice(name: str) -> None:
    """C1: every shipped YAML loads."""
    assert load_config(CONFIGS / name).notices == ()


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_states_every_key_of_the_guide(name: str) -> None:
    """C1: a reader of the guide finds each of its keys, with a comment."""
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    for key in GUIDE_KEYS:
        assert any(line.lstrip("# ").startswith(f"{key}:") for line in lines), key


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_comment(name: str) -> None:
    """C1: every key line but the plain section heads says its effect."""
    for line in (CONFIGS / name).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#") and line.strip() != "data_config:":
            assert "  # " in line or line.lstrip().startswith("# "), line


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_leaves_precision_to_the_machine(name: str) -> None:
    """C7: no shipped config names a precision that a machine may not have."""
    assert not {"bf16", "fp16", "tf32"} & load_config(CONFIGS / name).training_args.keys()


@pytest.mark.parametrize("name", NAMES)
def test_libraries_accept_the_shipped_config(name: str, tmp_path: Path) -> None:
    """C4: the typed values build the real classes and arrive there unchanged."""
    from peft import LoraConfig, PrefixTuningConfig
    from transformers import GenerationConfig, Seq2SeqTrainingArguments

    config = load_config(CONFIGS / name)
    arguments = Seq2SeqTrainingArguments(**{**config.training_args, "output_dir": str(tmp_path), "use_cpu": True})
    assert arguments.learning_rate == config.training_args["learning_rate"]
    assert arguments.eval_strategy == config.training_args["eval_strategy"]
    assert arguments.report_to == []
    assert GenerationConfig(**config.generation_config).max_new_tokens == config.generation_config["max_new_tokens"]
    if config.peft_config is not None:
        kinds = {"LORA": LoraConfig, "PREFIX_TUNING": PrefixTuningConfig}
        built = dataclasses.asdict(kinds[config.peft_config["peft_type"]](**config.peft_config))
        expected = {key: set(value) if isinstance(value, list) else value for key, value in config.peft_config.items()}
        got = {key: set(built[key]) if isinstance(expected[key], set) else built[key] for key in expected}
        assert got == expected
