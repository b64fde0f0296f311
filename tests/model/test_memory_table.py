"""The tables of what the released models need, in configs/README.md: each number is the estimate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glm_edge_ft.checks.memory import step_formats
from glm_edge_ft.config import load_config
from glm_edge_ft.model.activations import BatchShape, trace_step
from glm_edge_ft.model.adapters import wrap_meta_model
from glm_edge_ft.model.memory import estimate_memory, measure_size
from glm_edge_ft.model.precision import Precision
from glm_edge_ft.training.loss import install_supervised_loss
from tests.bench.memory_table import LENGTH, MODELS, build_released_model, estimate_row, format_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TEXTS = {name: (CONFIGS / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}
OTHERS_ARE_SLOW = [
    name if name == "glm-edge-1.5b-chat" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS
]


def rows_of(text: str, model: str) -> list[str]:
    """Return the lines of Markdown tables that begin with a model's name."""
    return [line for line in text.splitlines() if line.startswith(f"| {model} |")]


@pytest.mark.parametrize("model", OTHERS_ARE_SLOW)
def test_the_memory_tables_are_what_the_command_prints(model: str) -> None:
    """Every number of a model's rows, in both languages."""
    printed = format_table(estimate_row(model, method) for method in ("LoRA", "full"))
    assert rows_of(printed, model) == rows_of(TEXTS["README.md"], model)
    assert rows_of(printed, model) == rows_of(TEXTS["README_zh.md"].replace("| 全参数 |", "| full |"), model)
    assert len(rows_of(printed, model)) == 4


def test_the_memory_of_prefix_tuning_is_the_estimate() -> None:
    """It is told for the smallest model, without activation checkpointing."""
    model = wrap_meta_model(
        load_config(CONFIGS / "prefix.yaml").peft_config, build_released_model("glm-edge-1.5b-chat")
    )
    formats = step_formats(Precision("bfloat16", bf16=True, fp16=False, reason=""), deepspeed=False, on_gpu=True)
    size = measure_size(model)
    trace = trace_step(model, BatchShape(1, LENGTH, LENGTH - 1), formats, install_supervised_loss)
    need = f"{estimate_memory(size, 'bfloat16', trace=trace).total / 1e9:.1f} GB"
    for text in TEXTS.values():
        (line,) = re.findall(r"^- .*1\.5B.*3\.7 GB.*$", text, flags=re.MULTILINE)
        assert need in line
