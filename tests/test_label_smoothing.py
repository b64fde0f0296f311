"""Runs with smoothed labels, against transformers' own smoothing of full logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GlmForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from glm_edge_ft import recipe
from glm_edge_ft.checks.preflight import check_inputs, prepare
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from glm_edge_ft.run import RunRequest, build_collator
from tests.launch import launch
from tests.runs import LORA, losses, metrics, write_config

SMOOTHED: dict[str, Any] = {
    "peft": LORA | {"lora_dropout": 0.0},  # such an adapter changes nothing before its first step
    "label_smoothing_factor": 0.1,
    "max_steps": 1,
    "per_device_train_batch_size": 12,
    "save_strategy": "no",
}
Folders = Callable[[str], tuple[Path, Path, Path]]


@pytest.fixture
def folders(chat_folder: Path, vision_model: Path, vision_data: Path) -> Folders:
    """Return a function that gives an empty folder, a data folder and a model folder for either kind of run."""
    return lambda kind: (
        chat_folder,
        vision_data if kind == "vision" else chat_folder / "data",
        vision_model if kind == "vision" else chat_folder / "model",
    )


def loss_on_full_logits(folder: Path, data: Path, model: Path, kind: str, factor: float) -> float:
    """Return the loss of the untrained model over all training rows, by transformers' LabelSmoother."""
    path = write_config(folder / "reference", **SMOOTHED)
    prepared = prepare(check_inputs(RunRequest(data, str(model), path, takes_images=kind == "vision")))
    dataset = prepared.datasets["train"]
    batch = dict(build_collator(prepared, "right")([dataset[index] for index in range(len(dataset))]))
    labels = batch.pop("labels")
    whole: Any = load_glm_edge_v(model, torch.float32) if kind == "vision" else GlmForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logits = whole.eval()(**batch).logits.double()
    return float(LabelSmoother(factor)({"logits": logits}, labels, shift_labels=True))


@pytest.mark.parametrize("kind", ["chat", "vision"])
def test_the_loss_is_transformers_own_on_shifted_labels(kind: str, folders: Folders) -> None:
    """K12: whole batch, accumulated and without padding; evaluation stays the plain loss per token."""
    folder, data, model = folders(kind)
    rows = sum(1 for _ in (data / "train.jsonl").open(encoding="utf-8"))
    options = {**SMOOTHED, "per_device_train_batch_size": rows, "val": "train.jsonl", "eval_on_start": True}
    options |= {"eval_strategy": "steps", "predict_with_generate": False}
    forms: dict[str, dict[str, Any]] = {
        "whole": {},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows},
        "packed": {"top": {"padding_free": True}},
    }
    smoothed, plain = (loss_on_full_logits(folder, data, model, kind, factor) for factor in (0.1, 0.0))
    assert abs(smoothed - plain) > 1e-4 * plain
    for name, settings in forms.items():
        path = write_config(folder / name, **{**options, **settings})
        recipe.run(RunRequest(data, str(model), path, takes_images=kind == "vision"))
        assert losses(folder / name)[1][0] == pytest.approx(smoothed, rel=1e-5), name
        assert metrics(folder / name)[0]["eval_loss"] == pytest.approx(plain, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "vision"])
def test_two_processes_divide_by_the_tokens_of_both(kind: str, folders: Folders) -> None:
    """K12: rows of different lengths in two ranks give the loss of one process."""
    folder, data, model = folders(kind)
    rows = sum(1 for _ in (data / "train.jsonl").open(encoding="utf-8"))
    script = "finetune_vision.py" if kind == "vision" else "finetune.py"
    options = {**SMOOTHED, "per_device_train_batch_size": rows // 2, "script": script}
    output = launch(folder / "two", data, model, processes=2, **options)
    expected = loss_on_full_logits(folder, data, model, kind, 0.1)
    assert losses(output)[1][0] == pytest.approx(expected, rel=1e-5)
