"""MODEL: found, or refused with what to give instead; stop ids from every place that a checkpoint keeps them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
from glm_edge_ft.model.hub import is_hub_reachable
from glm_edge_ft.model.loading import build_meta_model, check_weights, load_weights, locate_model, read_checkpoint
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder
from tests.vision_folders import save_vision_folder


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer: TokenizerMaker) -> Path:
    """Return a model folder in the released layout."""
    return save_model_folder(tmp_path / "model", make_tokenizer("glm"))


def refusal(name: str) -> str:
    """Return what is said to MODEL `name`, by the light or by the heavy check."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(locate_model(name))
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_a_folder_is_read_without_its_weights(folder: Path) -> None:
    """Config, tokenizer and stop ids; the structure on the meta device."""
    (folder / "model.safetensors").unlink()
    checkpoint = read_checkpoint(locate_model(str(folder)))
    assert checkpoint.tokenizer.chat_template
    assert {parameter.device.type for parameter in build_meta_model(checkpoint).parameters()} == {"meta"}


def test_stop_ids_come_from_generation_config_config_and_tokenizer(folder: Path) -> None:
    """M3: each place may know another one; none is lost."""
    ids = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    by_text = {token["content"]: token["id"] for token in ids}
    for name, value in (
        ("generation_config.json", [by_text["<|user|>"]]),
        ("config.json", [by_text["<|observation|>"]]),
    ):
        content = json.loads((folder / name).read_text(encoding="utf-8")) | {"eos_token_id": value}
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    checkpoint = read_checkpoint(locate_model(str(folder)))
    wanted = sorted(by_text[text] for text in ("<|endoftext|>", "<|user|>", "<|observation|>"))
    assert list(checkpoint.stop_ids) == wanted
    model = load_weights(checkpoint, torch.float32)
    assert model.generation_config.eos_token_id == wanted


def test_a_checkpoint_of_2024_loads_with_full_rotary(folder: Path) -> None:
    """The released config.json has `rope_theta` and `partial_rotary_factor` at its top level, and `torch_dtype`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_weights(read_checkpoint(locate_model(str(folder))), torch.float32)
    assert model.config.rope_parameters["partial_rotary_factor"] == 1.0
    assert model.model.rotary_emb.inv_freq.shape == (8,)  # half of head_dim 16: all of it is rotated


def test_an_untied_head_is_loaded_though_the_config_says_tied(folder: Path) -> None:
    """The released config was seen with `tie_word_embeddings: true` beside files that hold their own lm_head."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    model = load_weights(read_checkpoint(locate_model(str(folder))), torch.float32)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


def test_missing_weights_are_refused_not_invented(folder: Path) -> None:
    """Transformers would fill them with random numbers."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing from its files: model\.norm\.weight"):
        load_weights(read_checkpoint(locate_model(str(folder))), torch.float32)


def test_no_weights_file_is_a_plain_refusal(folder: Path) -> None:
    """An interrupted download."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its weights cannot be read"):
        load_weights(read_checkpoint(locate_model(str(folder))), torch.float32)


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_a_cut_weights_file_is_a_plain_refusal(folder: Path, size: int) -> None:
    """A download that ended early: in the header's length, in the header, in the data."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="its weights cannot be read"):
        load_weights(read_checkpoint(locate_model(str(folder))), torch.float32)


def test_paths_that_are_no_model_are_refused(tmp_path: Path, folder: Path) -> None:
    """A folder that is not there, a file, an empty folder, an adapter, a broken config."""
    assert "there is no such folder" in refusal("./nowhere")
    assert "glm-edge-nano" in refusal("glm-edge-nanoo")  # the embedded models are named
    assert "is a file, not a folder" in refusal(str(folder / "config.json"))
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refusal(str(tmp_path / "empty"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "holds an adapter, not a model" in refusal(str(tmp_path / "adapter"))
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be read as JSON" in refusal(str(folder))


def test_a_vision_checkpoint_is_known_by_its_config(tmp_path: Path, backend: Tokenizer) -> None:
    """AutoModelForCausalLM would load it silently as a text-only model, and lose its vision part when saved."""
    checkpoint = read_checkpoint(locate_model(str(save_vision_folder(tmp_path, backend))))
    assert checkpoint.is_vision
    structure = {name: tensor.shape for name, tensor in build_meta_model(checkpoint).state_dict().items()}
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()} == structure
    check_weights(checkpoint)
    model: Any = load_weights(checkpoint, torch.bfloat16)
    assert type(model) is GlmEdgeVForCausalLM
    assert model.generation_config.eos_token_id == list(checkpoint.stop_ids)
    assert model.name_or_path == str(tmp_path)


def test_the_weight_files_of_a_vision_checkpoint_are_checked_by_their_headers(
    tmp_path: Path, backend: Tokenizer
) -> None:
    """The pooling head, which no run uses, may be there; a missing bias of the adapter is named."""
    folder = save_vision_folder(tmp_path, backend)
    state = load_file(folder / "model.safetensors")
    head = "model.vision.vit.model.vision_model.head.probe"
    save_file(state | {head: torch.zeros(1, 1, 24)}, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = read_checkpoint(locate_model(str(folder)))
    check_weights(checkpoint)
    del state["model.vision.adapter.conv.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing from its files: model\.vision\.adapter\.conv\.bias"):
        check_weights(checkpoint)


def test_a_vision_config_with_missing_fields_is_refused(folder: Path) -> None:
    """By name, all at once: transformers would take the sizes of another model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 8}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"vision_config\.image_size: must be a whole number, but is None"):
        read_checkpoint(locate_model(str(folder)))


def test_a_tokenizer_without_template_is_refused(folder: Path) -> None:
    """A base model instead of a chat model."""
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(str(folder))


def test_a_name_close_to_an_embedded_model_gets_that_name() -> None:
    """A capital, a letter too few."""
    for name in ("GLM-edge-nano", "glm-edge-nan"):
        assert refusal(name).endswith("did you mean glm-edge-nano?")


def test_a_folder_with_model_and_adapter_is_refused(folder: Path) -> None:
    """Transformers would load the adapter without a word."""
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "holds a model and an adapter (adapter_config.json)" in refusal(str(folder))


def test_a_config_that_is_no_object_is_refused(folder: Path) -> None:
    """A list is JSON, but no config."""
    (folder / "config.json").write_text("[]", encoding="utf-8")
    assert "it holds a list, not an object" in refusal(str(folder))


def test_a_local_source_is_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved adapter names its base model by it, and must be loadable from another folder."""
    monkeypatch.chdir(folder.parent)
    checkpoint = read_checkpoint(locate_model("model"))
    assert checkpoint.location.name == "model"
    assert load_weights(checkpoint, torch.float32).name_or_path == str(folder)


def test_a_missing_pad_token_comes_from_the_config(folder: Path) -> None:
    """tokenizer_config.json knows neither pad nor end; the config does, or nothing does."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in ("pad_token", "eos_token")}
    path.write_text(json.dumps(settings), encoding="utf-8")
    checkpoint = read_checkpoint(locate_model(str(folder)))
    assert checkpoint.tokenizer.pad_token_id == checkpoint.config.pad_token_id
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"pad_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "neither its tokenizer nor its config says which token pads" in refusal(str(folder))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{", '{"model": 1}'])
def test_a_broken_tokenizer_file_is_a_plain_refusal_or_harmless(folder: Path, name: str, content: str) -> None:
    """No file's content ends in a traceback; a usable tokenizer has a token to pad with."""
    (folder / name).write_text(content, encoding="utf-8")
    try:
        assert read_checkpoint(locate_model(str(folder))).tokenizer.pad_token_id is not None
    except UserError as error:
        assert "its tokenizer" in str(error)


def test_a_model_that_is_no_causal_one_is_refused_by_name(folder: Path) -> None:
    """An encoder for classification."""
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30, "hidden_size": 12}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "is no causal language model (bert: BertForMaskedLM)" in refusal(str(folder))


def put_in_cache(cache: Path, folder: Path) -> None:
    """Lay the folder into a cache of huggingface_hub as someone/tiny."""
    repository = cache / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[str]:
    """Let huggingface_hub use the cache and a hub at which nobody listens; return the list of connections tried."""
    tried: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    is_hub_reachable.cache_clear()

    def refuse(address: Any, *_: Any, **__: Any) -> None:
        tried.append(str(address))
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    return tried


def test_a_cached_hub_id_is_read_without_a_connection(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Config, tokenizer, generation config and weights."""
    put_in_cache(tmp_path / "cache", folder)
    tried = use_cache(monkeypatch, tmp_path / "cache")
    checkpoint = read_checkpoint(locate_model("someone/tiny"))
    check_weights(checkpoint)
    load_weights(checkpoint, torch.float32)
    assert len(tried) <= 1  # huggingface_hub asks once per process for a list of its own


def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No six attempts for each file, and one message."""
    tried = use_cache(monkeypatch, tmp_path)
    for _ in range(2):
        assert "nor reachable on the hub" in refusal("someone/tiny")
    assert len(tried) <= 2  # ours, and the one for huggingface_hub's own list
    assert "Retry" not in caplog.text


def test_a_hub_id_that_cannot_be_had_gets_one_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and nothing cached: what it is, and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    text = refusal("someone/glm-edge-none")
    assert "neither a folder, nor cached on this machine, nor reachable on the hub" in text
    assert "download the model where there is a network and give its folder as MODEL" in text


def test_an_adapters_own_tokenizer_goes_before_its_base_models(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """R7: the template and the stop ids of the training, whatever copy of the base model is given."""
    base = save_model_folder(tmp_path / "base", make_tokenizer("glm"))
    adapter = tmp_path / "adapter"
    make_tokenizer("glm-newline").save_pretrained(adapter)
    GenerationConfig(eos_token_id=[7]).save_pretrained(adapter)
    plain = read_checkpoint(locate_model(str(base)))
    location = replace(locate_model(str(base)), adapter=adapter)
    adapted = read_checkpoint(location)
    assert adapted.tokenizer.chat_template == make_tokenizer("glm-newline").chat_template
    assert adapted.stop_ids == tuple(sorted({7, *plain.stop_ids}))
    (adapter / "chat_template.jinja").unlink()  # other tools save a tokenizer without a template, or none
    assert read_checkpoint(location).tokenizer.chat_template == plain.tokenizer.chat_template
    (adapter / "tokenizer.json").unlink()
    assert read_checkpoint(location).tokenizer.chat_template == plain.tokenizer.chat_template


@pytest.mark.parametrize("samples", [True, False])
def test_a_checkpoint_with_settings_of_sampling_can_be_saved(folder: Path, tmp_path: Path, samples: bool) -> None:
    """M3: as some releases have them, with `do_sample` and without; transformers refuses to save the latter."""
    path = folder / "generation_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(written | {"do_sample": samples, "temperature": 0.8, "top_p": 0.8}), encoding="utf-8")
    checkpoint = read_checkpoint(locate_model(str(folder)))
    load_weights(checkpoint, torch.float32).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text(encoding="utf-8"))
    assert saved["eos_token_id"] == list(checkpoint.stop_ids)
    assert [saved.get(name) for name in ("temperature", "top_p")] == ([0.8, 0.8] if samples else [None, None])
