"""The tables of configs/README.md: keys exist and have the defaults that are told; old names are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Seq2SeqTrainingArguments

from glm_edge_ft.config import load_config
from glm_edge_ft.config.keys import key_table as key_rules
from glm_edge_ft.config.rules import METRICS
from glm_edge_ft.config.settings import DATA_KEYS, TOP_KEYS
from glm_edge_ft.model.adapters import build_peft_config
from tests import write_config_docs
from tests.model_folders import tiny_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = ("README.md", "README_zh.md")
TEXTS = {name: (CONFIGS / name).read_text(encoding="utf-8") for name in NAMES}
each_readme = pytest.mark.parametrize("name", NAMES)


def table(name: str, first_key: str) -> list[list[str]]:
    """Return the cells of the table whose first row holds `first_key` in its first cell."""
    for lines in re.findall(r"(?:^\|.*\|\n)+", TEXTS[name], flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()]
        if first_key in rows[2][0]:
            return rows[2:]
    raise AssertionError(f"{name} has no table that begins with {first_key}")


def key_table(name: str) -> dict[str, str]:
    """Return key → what holds if it is left out."""
    return {row[0].strip("`"): row[2] for row in table(name, "data_config.train_file")}


def dotted_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every value of a config."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_tables_are_what_the_config_knows_of_its_keys() -> None:
    """After a change `python -m tests.write_config_docs` writes them anew; the Chinese table has the same keys."""
    for path, text in write_config_docs.written().items():
        assert path.read_text(encoding="utf-8") == text, path.name
    assert list(key_table("README_zh.md")) == list(key_table("README.md"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_table_has_every_key_of_the_shipped_configs(path: Path) -> None:
    """A reader finds each key of a shipped file."""
    assert set(dotted_keys(yaml.safe_load(path.read_text(encoding="utf-8")))) <= set(key_table("README.md"))


def as_text(value: Any) -> str:
    """Write a value as the table does."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, set):
        return f"[{', '.join(sorted(value))}]"
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return dotted key → the value that holds in a run whose config does not have it."""
    folder = tmp_path_factory.mktemp("defaults")
    path = folder / "least.yaml"
    least = f"data_config:\n  train_file: train.jsonl\ntraining_args:\n  output_dir: {folder}\n"
    path.write_text(least, encoding="utf-8")
    config = load_config(path)
    path.write_text(least.replace("train.jsonl\n", "train.jsonl\n  val_file: dev.jsonl\n"), encoding="utf-8")
    best = [f"training_args.{text}" for text in ("eval_strategy=epoch", "save_strategy=epoch")]
    keeps_best = load_config(path, [*best, "training_args.load_best_model_at_end=true"])
    training = vars(Seq2SeqTrainingArguments(**config.training_args, use_cpu=True))
    training["activation_checkpointing"] = bool(training["activation_checkpointing"])
    training["report_to"] = config.training_args["report_to"]  # the class turns none into an empty list
    training["metric_for_best_model"] = keeps_best.training_args["metric_for_best_model"]
    lora = vars(build_peft_config({"peft_type": "LORA"}, tiny_model()))
    prefix = build_peft_config({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, tiny_model())
    return {
        **{key: getattr(config, key) for key in TOP_KEYS},
        **{f"data_config.{key}": getattr(config.data_config, key) for key in DATA_KEYS},
        **{f"training_args.{key}": value for key, value in training.items()},
        **{f"peft_config.{key}": value for key, value in (vars(prefix) | lora).items()},
    }


@each_readme
def test_the_table_tells_the_real_defaults(name: str, defaults: dict[str, Any]) -> None:
    """Where the last column begins with a value, a config without the key has that value."""
    compared = 0
    for key, cell in key_table(name).items():
        literal = re.match(r"`([^`]+)`", cell)
        if literal is None:
            continue
        stated, real = literal[1], as_text(defaults[key])
        if key == "peft_config.target_modules":
            stated = f"[{', '.join(sorted(re.findall(r'[a-z]_proj', stated)))}]"
        is_number = isinstance(defaults[key], int | float) and not isinstance(defaults[key], bool)
        assert float(stated) == defaults[key] if is_number else stated == real, key
        compared += 1
    assert compared > 30


@each_readme
def test_retired_names_are_really_retired(name: str) -> None:
    """C1, C2: the names that are said to do nothing any more are read with a notice."""
    (line,) = re.findall(r"^.*`combine`.*$", TEXTS[name], flags=re.MULTILINE)
    names = re.findall(r"`([^`]+)`", line)
    assert len(names) == 4
    for old in names:
        assert "retired" in (key_rules()["old"]["training_args"] | key_rules()["old"]["top"])[old], old


@each_readme
def test_metric_names_are_those_that_exist(name: str) -> None:
    """C8: the metrics are listed in the order of the code."""
    (line,) = re.findall(r"^.*`rouge-1`.*$", TEXTS[name], flags=re.MULTILINE)
    assert tuple(re.findall(r"`([^`]+)`", line))[: len(METRICS)] == METRICS


def test_a_relative_deepspeed_path_starts_from_the_yaml_files_folder(tmp_path: Path) -> None:
    """C6: the YAML block is read as the text says."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", TEXTS["README.md"], flags=re.MULTILINE | re.DOTALL)
    path = tmp_path / "run.yaml"
    head = "data_config:\n  train_file: train.jsonl\n"
    path.write_text(head + block + "  output_dir: ./output/x\n", encoding="utf-8")
    (tmp_path / "ds_zero_2.json").write_text("{}", encoding="utf-8")
    assert load_config(path).training_args["deepspeed"] == str((tmp_path / "ds_zero_2.json").resolve())
