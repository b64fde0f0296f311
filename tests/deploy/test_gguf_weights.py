"""The tensors of GGUF files and the keys of their architectures, read back; models that llama.cpp would not follow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

from glm_edge_ft.deploy.merge import merge
from tests.conftest import TokenizerMaker
from tests.deploy.gguf_files import export, model_key, read_gguf, refusal
from tests.model_folders import save_model_folder
from tests.runs import read_json, update_json


def changed(folder: Path, model: Path, config: dict[str, Any], **weights: float) -> Path:
    """Copy a model with other values in config.json, and another first number in some weights."""
    shutil.copytree(model, folder)
    update_json(folder / "config.json", **config)
    stored = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        stored[name][0, 0] = value
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_file_says_how_the_model_is_computed(model_folder: Path, tmp_path: Path) -> None:
    """R7: the keys that llama.cpp reads for GLM-Edge, with the values of config.json."""
    keys = export(model_folder, tmp_path / "model.gguf", kind="f32").keys
    assert keys["general.architecture"] == "chatglm"
    assert keys["general.type"] == "model"
    assert keys["general.file_type"] == 0
    expected = {
        "context_length": 8192,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "vocab_size": len(AutoTokenizer.from_pretrained(model_folder)),
    }
    assert {name: keys[f"chatglm.{name}"] for name in expected} == expected
    assert keys["chatglm.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_the_numbers_are_those_of_the_merged_model(runs: dict[str, Path], tmp_path: Path) -> None:
    """E5: the adapter is merged on the way; in f32 every number is that of the folder that `merge` writes."""
    found = export(runs["lora"], tmp_path / "model.gguf", kind="f32").tensors
    merge(str(runs["lora"]), tmp_path / "merged", dtype="float32")
    expected = load_file(tmp_path / "merged/model.safetensors")
    assert {model_key(name) for name in found} == set(expected)
    for name, numbers in found.items():
        assert torch.equal(numbers, expected[model_key(name)]), name


def test_a_checkpoint_and_a_model_trained_whole_are_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    """R7: any MODEL_OR_CHECKPOINT, as the other commands take it."""
    found = export(runs["full"] / "checkpoint-6", tmp_path / "model.gguf", kind="f32")
    expected = load_file(runs["full"] / "checkpoint-6/model.safetensors")
    assert all(torch.equal(numbers, expected[model_key(name)]) for name, numbers in found.tensors.items())
    assert found.keys["general.name"] == "checkpoint-6"


def as_q8_0(numbers: torch.Tensor) -> torch.Tensor:
    """Return what q8_0 keeps: of 32 numbers one 16-bit scale, and each as a multiple of it between -127 and 127."""
    blocks = numbers.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    steps = torch.where(scale == 0, 0, blocks / scale)
    rounded = torch.sign(steps) * torch.floor(steps.abs() + 0.5)
    return (rounded * scale.to(torch.float16).float()).reshape(numbers.shape)


ROUNDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "f16": lambda numbers: numbers.to(torch.float16).float(),
    "bf16": lambda numbers: numbers.to(torch.bfloat16).float(),
    "q8_0": as_q8_0,
}


@pytest.mark.parametrize("kind", list(ROUNDING))
def test_matrices_are_rounded_and_norms_are_not(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """E5: merged in float32, then rounded once, to the format that `--type` names."""
    found = export(runs["lora"], tmp_path / "model.gguf", kind=kind)
    merge(str(runs["lora"]), tmp_path / "merged", dtype="float32")
    expected = load_file(tmp_path / "merged/model.safetensors")
    for name, numbers in found.tensors.items():
        exact = expected[model_key(name)]
        rounded = exact if exact.dim() == 1 else ROUNDING[kind](exact)
        torch.testing.assert_close(numbers, rounded, rtol=0, atol=1e-6 if kind == "q8_0" else 0)
        assert found.kinds[name] == ("F32" if exact.dim() == 1 else kind.upper())
    assert found.keys["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]


def test_rows_that_q8_0_cannot_cut_into_blocks_are_f16(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """A feed-forward layer of 80 is no multiple of 32."""
    folder = save_model_folder(tmp_path / "model", make_tokenizer("glm"), intermediate_size=80)
    kinds = export(folder, tmp_path / "model.gguf", kind="q8_0").kinds
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_tied_embeddings_are_written_once(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """llama.cpp takes the embeddings where there is no `output.weight`."""
    folder = save_model_folder(tmp_path / "model", make_tokenizer("glm"), tie_word_embeddings=True)
    found = export(folder, tmp_path / "model.gguf", kind="f32").tensors
    assert "output.weight" not in found
    assert torch.equal(found["token_embd.weight"], load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


def test_heads_wider_than_the_hidden_states_are_written_as_llama_cpp_wants_them(nano: Path, tmp_path: Path) -> None:
    """The embedded model's 4 heads of 64 make 256, its hidden states are 192: as a model of 256 it says the same.

    A model is built from the file's own keys and numbers, and compared with the embedded one.
    """
    file = export(nano, tmp_path / "model.gguf", kind="f32")
    config: Any = GlmConfig.from_pretrained(nano)
    config.hidden_size = file.keys["chatglm.embedding_length"]
    config.rms_norm_eps = file.keys["chatglm.attention.layer_norm_rms_epsilon"]
    wide = GlmForCausalLM(config).float().eval()
    wide.load_state_dict({model_key(name): numbers for name, numbers in file.tensors.items()})
    narrow = GlmForCausalLM.from_pretrained(nano, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(nano)
    ids = tokenizer("<|user|>\n今天天气怎么样？<|assistant|>\nIt is 25 degrees.<|user|>", return_tensors="pt").input_ids
    with torch.no_grad():
        found, expected = wide(ids).logits, narrow(ids).logits
    assert config.hidden_size == config.num_attention_heads * config.head_dim
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_the_vision_part_is_a_file_of_its_own(vision_run: Path, vision_model: Path, tmp_path: Path) -> None:
    """The adapter merged into both parts; names and keys that llama.cpp's projector `adapter` reads."""
    language = export(vision_run, tmp_path / "model.gguf", kind="f32")
    vision = read_gguf(tmp_path / "mmproj-model.gguf")
    merge(str(vision_run), tmp_path / "merged", dtype="float32")
    expected = load_file(tmp_path / "merged/model.safetensors")
    assert {model_key(name) for name in language.tensors} == {key for key in expected if "vision" not in key}
    assert len(vision.tensors) == sum("vision" in key for key in expected)
    adapter, tower = "model.vision.adapter.", "model.vision.vit.model.vision_model."
    for name, key in {
        "adapter.boi": f"{adapter}boi",
        "adapter.conv.weight": f"{adapter}conv.weight",
        "adapter.linear.gate.weight": f"{adapter}linear_proj.gate_proj.weight",
        "adapter.linear.dense_4h_to_h.weight": f"{adapter}linear_proj.dense_4h_to_h.weight",
        "v.patch_embd.weight": f"{tower}embeddings.patch_embedding.weight",
        "v.blk.1.attn_out.bias": f"{tower}encoder.layers.1.self_attn.out_proj.bias",
        "v.blk.0.ffn_up.weight": f"{tower}encoder.layers.0.mlp.fc1.weight",
        "v.post_ln.weight": f"{tower}post_layernorm.weight",
    }.items():
        assert torch.equal(vision.tensors[name].flatten(), expected[key].flatten()), name
    talk = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    tokenizer: Any = AutoTokenizer.from_pretrained(vision_model)
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    written = tokenizer.apply_chat_template(talk, chat_template=language.keys["tokenizer.chat_template"], **options)
    assert written == tokenizer.apply_chat_template(talk, **options)
    config = read_json(vision_model / "config.json")["vision_config"]
    assert vision.keys["general.architecture"] == "clip"
    assert vision.keys["clip.projector_type"] == "adapter"
    assert vision.keys["clip.vision.image_size"] == config["image_size"]
    assert vision.keys["clip.vision.attention.head_count"] == config["num_attention_heads"]
    assert vision.keys["clip.vision.image_mean"] == [0.5, 0.5, 0.5]
    assert vision.keys["clip.vision.projection_dim"] == language.keys["chatglm.embedding_length"]


def test_convolutions_and_positions_keep_formats_that_llama_cpp_computes_with(
    vision_model: Path, tmp_path: Path
) -> None:
    """Its convolution knows f32 and f16 alone, and positions are added in f32."""
    export(vision_model, tmp_path / "model.gguf", kind="bf16")
    kinds = read_gguf(tmp_path / "mmproj-model.gguf").kinds
    names = {"v.patch_embd": "F16", "adapter.conv": "F16", "v.position_embd": "F32", "v.blk.0.attn_q": "BF16"}
    assert {name: kinds[f"{name}.weight"] for name in names} == names


def test_a_model_of_another_kind_is_refused(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """Only GLM-Edge is written; llama.cpp's own script reads others."""
    tokenizer = make_tokenizer("glm")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    message = refusal(tmp_path / "model", tmp_path / "a.gguf")
    assert "is of the type llama, not a GLM-Edge" in message
    assert "convert_hf_to_gguf.py" in message


def test_a_computation_that_llama_cpp_does_not_know_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Another activation, scaled positions, narrow heads, quantized weights: each with its value."""
    rope: dict[str, Any] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hidden_act": "gelu"}, "its hidden_act is 'gelu'; llama.cpp computes GLM-Edge with 'silu'"),
        ({"rope_parameters": rope}, "its positions are scaled (linear)"),
        ({"head_dim": 8}, "its 4 heads of 8 are together less wide than its hidden states (64)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is stored in a quantized form"),
    ]
    for number, (values, text) in enumerate(cases):
        folder = changed(tmp_path / f"model-{number}", model_folder, values)
        assert text in refusal(folder, tmp_path / "a.gguf")


def test_numbers_that_a_format_cannot_hold_are_refused(model_folder: Path, tmp_path: Path) -> None:
    """Infinity would make every answer nonsense; bf16 reaches as far as f32."""
    name = "model.layers.0.mlp.down_proj.weight"
    large = changed(tmp_path / "large", model_folder, {}, **{name: 1e5})
    message = refusal(large, tmp_path / "a.gguf")
    assert f"{name}: holds the number 1e+05, and f16 ends at 65504" in message
    assert "--type bf16" in message
    export(large, tmp_path / "a.gguf", kind="bf16")
    broken = changed(tmp_path / "broken", model_folder, {}, **{name: float("nan")})
    assert "holds numbers that are not finite" in refusal(broken, tmp_path / "b.gguf", kind="f32")
