"""Weight files against the config, from their headers alone: what does not belong together is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.loading import check_weights, load_weights, locate_model, read_checkpoint
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer: TokenizerMaker) -> Path:
    """Return a model folder in the released layout."""
    return save_model_folder(tmp_path / "model", make_tokenizer("glm"))


def check(folder: Path) -> None:
    """Check the folder's weights as a run does."""
    checkpoint = read_checkpoint(locate_model(str(folder)))
    check_weights(checkpoint)


def refusal(folder: Path) -> str:
    """Return what is said to the folder's weights."""
    with pytest.raises(UserError) as caught:
        check(folder)
    return str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    """Write values into config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def change_weights(folder: Path, remove: str = "", more: dict[str, torch.Tensor] | None = None) -> None:
    """Write the weights without one and with more."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(remove, None)
    save_file(weights | (more or {}), folder / "model.safetensors", metadata={"format": "pt"})


def split_in_shards(folder: Path) -> None:
    """Replace the single file by an index and two shards."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard, part in (("model-1.safetensors", names[:5]), ("model-2.safetensors", names[5:])):
        save_file({name: weights[name] for name in part}, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")


def test_whole_checkpoints_pass(folder: Path) -> None:
    """In one file; with a head of its own though the config says tied, as released; in shards."""
    check(folder)
    change_config(folder, tie_word_embeddings=True)
    check(folder)
    split_in_shards(folder)
    check(folder)


def test_a_tied_head_need_not_be_in_the_files(folder: Path) -> None:
    """The head is the embedding then; without the tie it is missing."""
    change_weights(folder, remove="lm_head.weight")
    assert "1 weights are missing from its files: lm_head.weight" in refusal(folder)
    change_config(folder, tie_word_embeddings=True)
    check(folder)


def test_buffers_of_older_files_are_no_surplus(folder: Path) -> None:
    """transformers ignores `rotary_emb.inv_freq` too."""
    change_weights(folder, more={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    check(folder)


def test_a_config_with_fewer_layers_than_the_files_is_refused(folder: Path) -> None:
    """The layers left over would be dropped in silence, at loading too."""
    change_config(folder, num_hidden_layers=1)
    text = refusal(folder)
    assert "weights have no place in the model that config.json describes: model.layers.1.input_layernorm" in text
    assert text.endswith("...\n    -> take config.json and the weights from one download")
    with pytest.raises(UserError, match=r"have no place in .*: model\.layers\.1\.input_layernorm\.weight"):
        load_weights(read_checkpoint(locate_model(str(folder))), torch.float32)


def test_a_config_with_more_layers_than_the_files_is_refused(folder: Path) -> None:
    """The layers that are missing would be random numbers."""
    change_config(folder, num_hidden_layers=3)
    text = refusal(folder)
    assert "are missing from its files: model.layers.2.input_layernorm.weight" in text


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("intermediate_size", 128, "model.layers.0.mlp.down_proj.weight 64x96 for 64x128"),
        ("hidden_size", 128, "lm_head.weight"),
        ("vocab_size", 1000, "x64 for 1000x64"),
    ],
)
def test_other_shapes_are_refused(folder: Path, key: str, value: int, shown: str) -> None:
    """A config.json of another size of the same model."""
    change_config(folder, **{key: value})
    text = refusal(folder)
    assert "weights have other shapes than config.json says: " in text
    assert shown in text


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_a_cut_file_is_refused(folder: Path, size: int) -> None:
    """A download that ended early: in the header's length, in the header, in the data."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    text = refusal(folder)
    assert text.startswith(f"{path}: its weights cannot be read: ")
    assert str(size) in text


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    """An interrupted download."""
    split_in_shards(folder)
    (folder / "model-2.safetensors").unlink()
    assert "1 of 2 weight files are missing: model-2.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    assert "model.safetensors.index.json is no index of weight files" in refusal(folder)


def test_pickles_are_not_loaded(folder: Path) -> None:
    """Only `*.bin`: why not, and how to convert; and a folder without weights at all."""
    (folder / "model.safetensors").unlink()
    assert "the folder has neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    text = refusal(folder)
    assert "these are pickles, which can run code when read, and are not loaded" in text
    assert "load the model once with transformers and write it with save_pretrained" in text
