"""GLM-Edge-V checkpoints: the released layout is read and written key by key, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM, SiglipVisionModel

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM, load_glm_edge_v
from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig, is_vision_config, read_glm_edge_v_config
from tests.model.vision_fixtures import (
    SMALL_VOCABULARY,
    TINY_2B,
    TINY_5B,
    TRUE_2B,
    TRUE_5B,
    Shape,
    image_row,
    random_images,
    random_weights,
    released_config,
    released_shapes,
    write_checkpoint,
)
from tests.model_folders import tiny_model

HEAD = "vision_model.head."


def without_head(names: Any) -> set[str]:
    """Return the keys that are loaded: all but those of the pooling head."""
    return {name for name in names if HEAD not in name}


def logits_of(model: Any, shape: Shape) -> torch.Tensor:
    """Return the logits of a row with an image."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([image_row(shape, 5, 6)]), pixel_values=random_images(1)).logits


@pytest.mark.parametrize("shape", [TINY_2B, TINY_5B], ids=["v-2b", "v-5b"])
def test_a_released_checkpoint_loads_key_by_key(tmp_path: Path, shape: Shape) -> None:
    """Nothing is missing, nothing unexpected but the pooling head, and every weight is what the file holds."""
    weights = random_weights(shape)
    folder = write_checkpoint(tmp_path, shape, weights)
    config = read_glm_edge_v_config(folder)
    loaded: Any = GlmEdgeVForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert (set(loaded[1]["missing_keys"]), set(loaded[1]["unexpected_keys"])) == (set(), set())
    state = load_glm_edge_v(folder, torch.float32).state_dict()
    assert set(state) == without_head(weights)
    for name, values in state.items():
        assert torch.equal(values, weights[name]), name
    assert any(HEAD in name for name in weights)


@pytest.mark.parametrize("shape", [TINY_2B, TINY_5B], ids=["v-2b", "v-5b"])
def test_saving_writes_the_released_keys_and_config(tmp_path: Path, shape: Shape) -> None:
    """Same keys, shapes and config fields, so that other tools read the folder; logits bit-equal after reloading."""
    model = load_glm_edge_v(write_checkpoint(tmp_path / "released", shape), torch.float32).eval()
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: size for name, size in released_shapes(shape).items() if HEAD not in name}
    fields = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    released = released_config(shape)
    changed = {
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "transformers_version": fields["transformers_version"],
    }
    assert {name: fields.get(name) for name in released} == released | changed
    assert "boundary_shape" not in fields
    again = load_glm_edge_v(tmp_path / "saved", torch.float32).eval()
    assert torch.equal(logits_of(again, shape), logits_of(model, shape))


def test_the_format_is_that_asked_for(tmp_path: Path) -> None:
    """`dtype` wins over `torch_dtype` of the config, in tower, adapter and text."""
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY)
    for dtype in (torch.bfloat16, torch.float32):
        assert {parameter.dtype for parameter in load_glm_edge_v(folder, dtype).parameters()} == {dtype}


def test_a_checkpoint_in_several_files_loads_alike(tmp_path: Path) -> None:
    """The index names the files; boi, eoi and lm_head are found through it."""
    weights = {**random_weights(SMALL_VOCABULARY, boundary=(32,))}
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY, weights, shards=3)
    model = load_glm_edge_v(folder, torch.float32)
    assert model.config.boundary_shape == (32,)
    assert model.config.tie_word_embeddings is False
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("boundary", [(32,), (1, 32), (1, 1, 32)])
def test_boi_and_eoi_keep_the_rank_that_they_are_stored_in(tmp_path: Path, boundary: tuple[int, ...]) -> None:
    """Their rank is not known for certain: each loads, computes the same, and is written back as it was."""
    weights = random_weights(SMALL_VOCABULARY)
    expected = logits_of(
        load_glm_edge_v(write_checkpoint(tmp_path / "3", SMALL_VOCABULARY, weights), torch.float32), SMALL_VOCABULARY
    )
    keys = ("model.vision.adapter.boi", "model.vision.adapter.eoi")
    reshaped = weights | {key: weights[key].reshape(boundary) for key in keys}
    model = load_glm_edge_v(write_checkpoint(tmp_path / "other", SMALL_VOCABULARY, reshaped), torch.float32)
    assert torch.equal(logits_of(model, SMALL_VOCABULARY), expected)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert [tuple(stored[key].shape) for key in keys] == [boundary, boundary]


def test_a_boundary_of_another_width_is_refused(tmp_path: Path) -> None:
    """It cannot be a vector of the language model."""
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY, random_weights(SMALL_VOCABULARY, boundary=(1, 1, 31)))
    with pytest.raises(UserError) as caught:
        load_glm_edge_v(folder, torch.float32)
    assert caught.value.problems[0].where == f"MODEL {folder}: model.vision.adapter.boi"
    assert caught.value.problems[0].what == "has the shape (1, 1, 31), but must hold hidden_size = 32 numbers"


def test_missing_and_unknown_weights_are_refused_by_name(tmp_path: Path) -> None:
    """A missing weight would be filled with random numbers, an unknown one means another model."""
    weights = random_weights(SMALL_VOCABULARY)
    bias = weights.pop("model.vision.adapter.conv.bias")
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY, weights | {"model.vision.adapter.scale": bias})
    with pytest.raises(UserError) as caught:
        load_glm_edge_v(folder, torch.float32)
    assert [problem.what for problem in caught.value.problems] == [
        "1 weights are missing from its files: model.vision.adapter.conv.bias",
        "1 weights have no place in the model that config.json describes: model.vision.adapter.scale",
    ]


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A config that belongs to other weights: both shapes are named."""
    config = released_config(SMALL_VOCABULARY) | {"num_attention_heads": 3}
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY, config=config)
    with pytest.raises(UserError) as caught:
        load_glm_edge_v(folder, torch.float32)
    assert [problem.what for problem in caught.value.problems] == [
        "4 weights have other shapes than config.json says: "
        "model.layers.0.self_attn.o_proj.weight 32x32 for 32x24, "
        "model.layers.0.self_attn.q_proj.weight 32x32 for 24x32, "
        "model.layers.1.self_attn.o_proj.weight 32x32 for 32x24, "
        "model.layers.1.self_attn.q_proj.weight 32x32 for 24x32"
    ]


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, shards: int) -> None:
    """An interrupted download, of the only file or of the last one, whose header nobody needs before."""
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY, shards=shards)
    last = max(folder.glob("*.safetensors"))
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"its weights cannot be read: .*incomplete metadata"):
        load_glm_edge_v(folder, torch.float32)


def test_a_tied_head_is_tied_where_none_is_stored(tmp_path: Path) -> None:
    """`tie_word_embeddings: true` counts when the files hold no `lm_head.weight`."""
    weights = random_weights(SMALL_VOCABULARY)
    del weights["lm_head.weight"]
    model = load_glm_edge_v(write_checkpoint(tmp_path, SMALL_VOCABULARY, weights), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_vision_checkpoint_is_told_from_a_chat_model(tmp_path: Path) -> None:
    """Both say `model_type: glm`; `AutoConfig` reads both as `GlmConfig`."""
    vision = write_checkpoint(tmp_path / "vision", SMALL_VOCABULARY)
    tiny_model().save_pretrained(tmp_path / "chat")
    configs = [AutoConfig.from_pretrained(folder) for folder in (vision, tmp_path / "chat")]
    assert [type(config) for config in configs] == [GlmConfig, GlmConfig]
    assert [is_vision_config(config) for config in configs] == [True, False]
    assert is_vision_config(read_glm_edge_v_config(vision))
    with pytest.raises(UserError, match="is no vision model"):
        read_glm_edge_v_config(tmp_path / "chat")


def test_plain_glm_models_load_as_before(tmp_path: Path) -> None:
    """Nothing is registered with the Auto classes."""
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GlmForCausalLM


@pytest.mark.parametrize("name", ["num_attention_heads", "image_size", "hidden_size"])
def test_a_tower_config_with_a_gap_is_refused(tmp_path: Path, name: str) -> None:
    """transformers would put the number of another SigLIP in its place."""
    config = released_config(SMALL_VOCABULARY)
    del config["vision_config"][name]
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY, config=config)
    with pytest.raises(UserError) as caught:
        read_glm_edge_v_config(folder)
    assert caught.value.problems[0].where == f"MODEL {folder}: config.json: vision_config.{name}"
    assert caught.value.problems[0].what == "must be a whole number, but is None"


def test_a_config_without_the_placeholders_id_is_refused(tmp_path: Path) -> None:
    """Which token stands for an image is the checkpoint's to say."""
    config = released_config(SMALL_VOCABULARY)
    del config["boi_token_id"]
    folder = write_checkpoint(tmp_path, SMALL_VOCABULARY, config=config)
    with pytest.raises(UserError, match="boi_token_id: must be the id of the image placeholder, but is None"):
        read_glm_edge_v_config(folder)


def test_an_unreadable_folder_is_refused(tmp_path: Path) -> None:
    """No config at all: transformers would take its defaults."""
    with pytest.raises(UserError, match="its config cannot be read: there is no config"):
        load_glm_edge_v(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("shape", "vision", "text"),
    [(TRUE_2B, 466_192_112, 1_593_427_968), (TRUE_5B, 513_907_440, 4_327_984_128)],
    ids=["v-2b", "v-5b"],
)
def test_the_true_sizes_have_the_published_counts(shape: Shape, vision: int, text: int) -> None:
    """Counted without the pooling head and with an own head, as the published file sizes say; 447 vision tensors."""
    config = GlmEdgeVConfig.from_dict(released_config(shape) | {"tie_word_embeddings": False})
    with torch.device("meta"):
        model = GlmEdgeVForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_vision = [size for name, size in sizes.items() if name.startswith("model.vision.")]
    assert (sum(of_vision), len(of_vision)) == (vision, 447)
    assert sum(sizes.values()) - vision == text
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == {
        name: size for name, size in released_shapes(shape).items() if HEAD not in name
    }


def test_one_image_takes_578_tokens() -> None:
    """24 x 24 vectors, boi and eoi, from the geometry of the config."""
    config = GlmEdgeVConfig.from_dict(released_config(TINY_2B))
    assert (config.patches_per_side, config.tokens_per_image, config.boi_token_id) == (48, 578, 59256)


def test_a_new_model_is_initialised_whole() -> None:
    """boi and eoi are drawn like other weights; two builds from one seed are equal."""
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(GlmEdgeVForCausalLM(GlmEdgeVConfig.from_dict(released_config(SMALL_VOCABULARY))))
    adapter = models[0].model.vision.adapter
    assert adapter.boi.shape == (1, 1, 32)
    assert 0.01 < adapter.boi.std() < 0.04
    assert not torch.equal(adapter.boi, adapter.eoi)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


def test_the_attention_kind_reaches_the_tower(tmp_path: Path) -> None:
    """sdpa is the default for both parts; eager, set later, computes the same."""
    model = load_glm_edge_v(write_checkpoint(tmp_path, SMALL_VOCABULARY), torch.float32).eval()
    tower = model.model.vision.vit.model.vision_model
    assert isinstance(tower, SiglipVisionModel)
    assert (model.config._attn_implementation, tower.config._attn_implementation) == ("sdpa", "sdpa")
    expected = logits_of(model, SMALL_VOCABULARY)
    model.set_attn_implementation("eager")
    assert (model.config._attn_implementation, tower.config._attn_implementation) == ("eager", "eager")
    torch.testing.assert_close(logits_of(model, SMALL_VOCABULARY), expected, atol=1e-5, rtol=1e-5)
