"""Putting a saved adapter onto a model: as it was, or refused where it does not belong there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.adapters import apply_adapter
from glm_edge_ft.model.saved_folder import ADAPTER_WEIGHTS, load_adapter, read_adapter
from tests.model_folders import tiny_model
from tests.runs import LORA, PREFIX

SETTINGS = {
    "lora": LORA,
    "whole modules": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {**LORA, "target_modules": ["embed_tokens", "q_proj"]},
    "prefix": PREFIX,
    "projected prefix": {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 8},
}


def save(folder: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save an adapter with random weights; returns them."""
    torch.manual_seed(1)
    model: Any = apply_adapter(tiny_model(), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return load_file(folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_adapter_comes_back_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    """R7: every weight of the file is in the model, and nothing is trainable."""
    saved = save(tmp_path, SETTINGS[kind])
    model = load_adapter(tiny_model(), tmp_path)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(torch.equal(saved[name], values) for name, values in loaded.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_an_adapter_keeps_its_format_on_a_16_bit_model(tmp_path: Path) -> None:
    """As in training: the base model in bfloat16, the matrices in float32, bit for bit."""
    saved = save(tmp_path, LORA)
    base: Any = tiny_model()
    loaded = get_peft_model_state_dict(load_adapter(base.to(torch.bfloat16), tmp_path))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], values) for name, values in loaded.items())


def test_its_facts_are_read_without_its_weights(tmp_path: Path) -> None:
    """Kind, base model and the positions that a prefix takes."""
    save(tmp_path, PREFIX)
    adapter = read_adapter(tmp_path)
    assert (adapter.folder, adapter.peft_type, adapter.base, adapter.prefix_tokens) == (
        tmp_path,
        "PREFIX_TUNING",
        "",
        4,
    )


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    """A LoRA and a prefix on a model that they were not trained on: the sizes, and what to write."""
    model: Any = tiny_model()
    for settings, what in ((LORA, "size mismatch"), (PREFIX, "num_layers is 2, the model has 1")):
        save(tmp_path, settings)
        smaller = type(model)(
            type(model.config)(**{**model.config.to_dict(), "hidden_size": 32, "num_hidden_layers": 1})
        )
        with pytest.raises(UserError, match=f"(?s)this adapter does not fit .*{what}.*--base MODEL"):
            load_adapter(smaller, tmp_path)


def test_weights_without_a_place_and_places_without_weights_are_refused(tmp_path: Path) -> None:
    """PEFT passes over both: an adapter of more layers than the model has, and one that lacks some."""
    save(tmp_path, LORA)
    shallow: Any = tiny_model()
    shallow.model.layers = shallow.model.layers[:1]
    with pytest.raises(UserError, match=r"8 weights have no place in the model: .*layers\.1\."):
        load_adapter(shallow, tmp_path)
    path = tmp_path / ADAPTER_WEIGHTS
    kept = {name: values for name, values in load_file(path).items() if "layers.1." not in name}
    save_file(kept, path)
    with pytest.raises(UserError, match=r"8 weights are missing from it: .*layers\.1\."):
        load_adapter(tiny_model(), tmp_path)


def test_a_config_without_its_kind_is_refused(tmp_path: Path) -> None:
    """It is the config of something else."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}), encoding="utf-8")
    with pytest.raises(UserError, match="is no adapter config"):
        read_adapter(tmp_path)
