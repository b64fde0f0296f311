"""What a GGUF file holds, read back: the model's numbers, its tokenizer and template; and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoTokenizer,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from glm_edge_ft.deploy.export_gguf import INSTALL, ExportRequest, export_gguf
from glm_edge_ft.deploy.merge import MergeRequest, merge
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS
from tests.conftest import SPECIAL_TOKENS, TokenizerMaker
from tests.deploy.conftest import ROOT, command
from tests.deploy.gguf_files import GgufFile, model_key, read_gguf
from tests.model_folders import save_model_folder

CONTROL, USER_DEFINED, UNUSED, NORMAL = 3, 4, 5, 1


def export(model: Path | str, out: Path, **options: Any) -> GgufFile:
    """Export and read back."""
    export_gguf(ExportRequest(str(model), out, **options))
    return read_gguf(out)


def refusal(model: Path | str, out: Path, **options: Any) -> str:
    """Return the message that an export is refused with; nothing is left on disk."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export_gguf(ExportRequest(str(model), out, **options))
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


@pytest.fixture(scope="module")
def nano() -> Path:
    """Return the folder of the embedded chat model."""
    folder = EMBEDDED_MODELS["glm-edge-nano"]
    assert folder is not None
    return folder


# ---- what is in the file ----


def test_the_file_says_how_the_model_is_computed(model_folder: Path, tmp_path: Path) -> None:
    """R7: the keys that llama.cpp reads for GLM-Edge, with the values of config.json."""
    keys = export(model_folder, tmp_path / "model.gguf", type="f32").keys
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


def test_the_tokenizer_is_in_the_file(model_folder: Path, tmp_path: Path) -> None:
    """R7: every token with its kind, the merges in their order, the split pattern's name, no beginning added."""
    keys = export(model_folder, tmp_path / "model.gguf").keys
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    content = json.loads((model_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "glm4")
    assert keys["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds: dict[str, int] = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert {token for token, kind in kinds.items() if kind == CONTROL} == set(SPECIAL_TOKENS)
    assert set(kinds.values()) == {NORMAL, CONTROL}
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in keys


def test_every_stop_token_and_the_template_are_in_the_file(model_folder: Path, tmp_path: Path) -> None:
    """R7: a reply ends at `<|user|>`, at `<|observation|>` and at the end of the text, by ids that were looked up."""
    keys = export(model_folder, tmp_path / "model.gguf").keys
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    names = {"eos": "<|endoftext|>", "eot": "<|user|>", "eom": "<|observation|>"}
    names |= {"unknown": "<|endoftext|>", "padding": "<|endoftext|>"}
    found = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in names}
    assert found == {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template


def test_embeddings_without_a_token_are_unused(nano: Path, tmp_path: Path) -> None:
    """The embedded model has embeddings for 5,120 ids and 5,112 tokens, as released models have more than tokens."""
    keys = export(nano, tmp_path / "model.gguf").keys
    assert keys["tokenizer.ggml.tokens"][5111:5114] == ["<|end_of_image|>", "[PAD5112]", "[PAD5113]"]
    assert keys["tokenizer.ggml.token_type"][5111:] == [CONTROL, *([UNUSED] * 8)]
    assert keys["tokenizer.ggml.eot_token_id"] == 5107


def test_the_numbers_are_those_of_the_merged_model(runs: dict[str, Path], tmp_path: Path) -> None:
    """E5: the adapter is merged on the way; in f32 every number is that of the folder that `merge` writes."""
    found = export(runs["lora"], tmp_path / "model.gguf", type="f32").tensors
    merge(MergeRequest(str(runs["lora"]), tmp_path / "merged", dtype="float32"))
    expected = load_file(tmp_path / "merged/model.safetensors")
    assert {model_key(name) for name in found} == set(expected)
    for name, numbers in found.items():
        assert torch.equal(numbers, expected[model_key(name)]), name


def test_a_checkpoint_and_a_model_trained_whole_are_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    """R7: any MODEL_OR_CHECKPOINT, as the other commands take it."""
    found = export(runs["full"] / "checkpoint-6", tmp_path / "model.gguf", type="f32")
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
    found = export(runs["lora"], tmp_path / "model.gguf", type=kind)
    merge(MergeRequest(str(runs["lora"]), tmp_path / "merged", dtype="float32"))
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
    kinds = export(folder, tmp_path / "model.gguf", type="q8_0").kinds
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_tied_embeddings_are_written_once(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """llama.cpp takes the embeddings where there is no `output.weight`."""
    folder = save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = export(folder, tmp_path / "model.gguf", type="f32").tensors
    assert "output.weight" not in found
    assert torch.equal(found["token_embd.weight"], weights["model.embed_tokens.weight"])


def test_heads_wider_than_the_hidden_states_are_written_as_llama_cpp_wants_them(nano: Path, tmp_path: Path) -> None:
    """The embedded model's 4 heads of 64 make 256, its hidden states are 192: as a model of 256 it says the same.

    A model is built from the file's own keys and numbers, and compared with the embedded one.
    """
    file = export(nano, tmp_path / "model.gguf", type="f32")
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
    language = export(vision_run, tmp_path / "model.gguf", type="f32")
    vision = read_gguf(tmp_path / "mmproj-model.gguf")
    merge(MergeRequest(str(vision_run), tmp_path / "merged", dtype="float32"))
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
    config = json.loads((vision_model / "config.json").read_text(encoding="utf-8"))["vision_config"]
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
    export(vision_model, tmp_path / "model.gguf", type="bf16")
    kinds = read_gguf(tmp_path / "mmproj-model.gguf").kinds
    assert (kinds["v.patch_embd.weight"], kinds["adapter.conv.weight"], kinds["v.position_embd.weight"]) == (
        "F16",
        "F16",
        "F32",
    )
    assert kinds["v.blk.0.attn_q.weight"] == "BF16"


# ---- the split pattern ----


def save_with(folder: Path, backend: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Path:
    """Save a tiny model whose tokenizer.json was changed."""
    content = json.loads(backend.to_str())
    change(content)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}",
    )
    return save_model_folder(folder, tokenizer)


def test_another_split_pattern_is_refused_with_what_differs(tmp_path: Path, backend: Tokenizer) -> None:
    """llama.cpp would give other ids for the same text, and nobody would see why the answers are worse."""

    def single_digits(content: dict[str, Any]) -> None:
        split = content["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")

    message = refusal(save_with(tmp_path / "model", backend, single_digits), tmp_path / "model.gguf")
    assert "splits text in another way than llama.cpp's glm4: '2' + '2' + ' ' instead of '22' + ' ' + '333'" in message


def test_the_same_pieces_in_another_form_are_refused(tmp_path: Path, backend: Tokenizer) -> None:
    """A space put before every text, and pieces that are not in the byte-level alphabet."""

    def space_before(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True

    def no_bytes(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"].pop()

    for change, shown in ((space_before, "'ĠIt' + "), (no_bytes, "' we' + ")):
        message = refusal(save_with(tmp_path / change.__name__, backend, change), tmp_path / "model.gguf")
        assert f"splits text in another way than llama.cpp's glm4: {shown}" in message


def test_a_pattern_written_in_another_way_is_accepted(tmp_path: Path, backend: Tokenizer) -> None:
    """What counts is how text is split: here the letters of contractions are written out."""

    def written_out(content: dict[str, Any]) -> None:
        split = content["pre_tokenizer"]["pretokenizers"][0]
        old = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        new = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        assert old in split["pattern"]["Regex"]
        split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(old, new)

    keys = export(save_with(tmp_path / "model", backend, written_out), tmp_path / "model.gguf").keys
    assert keys["tokenizer.ggml.pre"] == "glm4"


def test_a_normalizer_is_refused(tmp_path: Path, backend: Tokenizer) -> None:
    """llama.cpp has none for byte-level BPE."""

    def normalize(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "NFC"}

    message = refusal(save_with(tmp_path / "model", backend, normalize), tmp_path / "model.gguf")
    assert "its tokenizer changes text before it splits it (NFC); llama.cpp does not" in message


def test_whole_words_are_taken_only_where_the_tokenizer_does(tmp_path: Path, backend: Tokenizer) -> None:
    """A token that no merge leads to: `glm4` would take it, the tokenizer does so only with `ignore_merges`."""

    def unreachable(ignore_merges: bool) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            vocab, merges = content["model"]["vocab"], content["model"]["merges"]
            first, second = merges.pop()
            vocab["qzx"] = vocab.pop(first + second)  # the last token that was learned, so that no other needs it
            content["model"]["ignore_merges"] = ignore_merges

        return change

    for ignore_merges, name in ((False, "chatglm-bpe"), (True, "glm4")):
        folder = save_with(tmp_path / name, backend, unreachable(ignore_merges))
        assert export(folder, tmp_path / f"{name}.gguf").keys["tokenizer.ggml.pre"] == name


def test_tokens_that_were_added_as_words_are_not_control(tmp_path: Path, backend: Tokenizer) -> None:
    """They are text that a user may write."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.add_tokens([AddedToken("GLM-Edge", special=False)])
    folder = save_with(tmp_path / "model", backend, lambda content: None)
    keys = export(folder, tmp_path / "model.gguf").keys
    assert keys["tokenizer.ggml.token_type"][keys["tokenizer.ggml.tokens"].index("GLM-Edge")] == USER_DEFINED


# ---- what is refused ----


def test_a_prefix_cannot_be_in_a_file(runs: dict[str, Path], tmp_path: Path) -> None:
    """E5: with the reason that `merge` gives."""
    assert "changes no weights" in refusal(runs["prefix"], tmp_path / "model.gguf")


def test_all_mistakes_of_a_command_line_are_listed(tmp_path: Path) -> None:
    """Exit 2, before anything heavy, one line for each."""
    done = command("export-gguf", str(tmp_path / "none"), str(tmp_path), "--type", "fp16")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 3 problems in the input\n")
    assert "--type fp16: there is no such type\n    -> did you mean f16?" in done.stderr
    assert f"OUT {tmp_path}: is a folder\n    -> name a file in it: {tmp_path / 'model.gguf'}" in done.stderr


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("Q8_0", "did you mean q8_0?"),
        ("q8", "did you mean q8_0?"),
        ("bfloat16", "did you mean bf16?"),
        ("q4_k_m", "choose from f32, f16, bf16, q8_0; llama.cpp's llama-quantize makes smaller ones of an f16 file"),
        ("int", "choose from f32, f16, bf16, q8_0"),
    ],
)
def test_a_wrong_type_gets_a_hint(kind: str, hint: str, tmp_path: Path) -> None:
    """Other names of the same formats, and smaller ones that llama.cpp makes itself."""
    assert refusal("glm-edge-nano", tmp_path / "a.gguf", type=kind).endswith(f"-> {hint}")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """Neither the file nor what is written beside it; other places that cannot be are refused too."""
    for name in ("a.gguf", "b.Modelfile", "mmproj-c.gguf"):
        (tmp_path / name).write_text("", encoding="utf-8")
        out = tmp_path / f"{name[-6 if name.endswith('.gguf') else 0]}.gguf"
        assert "is there already, and nothing is written over" in refusal("glm-edge-nano", out)
    assert "does not end in .gguf\n    -> name it d.bin.gguf" in refusal("glm-edge-nano", tmp_path / "d.bin")
    with pytest.raises(UserError, match="cannot be written there"):
        export_gguf(ExportRequest("glm-edge-nano", tmp_path / "a.gguf" / "below" / "e.gguf"))


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional; the message says what to run, with the version that was tested."""
    required = (ROOT / "tests/requirements.txt").read_text(encoding="utf-8").split()
    assert INSTALL.removeprefix("pip install ") in required
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refusal("glm-edge-nano", tmp_path / "a.gguf")
    assert message == f"export-gguf: needs the package gguf, which is not installed\n    -> {INSTALL}"


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


def change_config(folder: Path, model: Path, **values: Any) -> Path:
    """Copy a model's folder with other values in its config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")
    return folder


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
        folder = change_config(tmp_path / f"model-{number}", model_folder, **values)
        assert text in refusal(folder, tmp_path / "a.gguf")


def change_weight(folder: Path, model: Path, value: float) -> Path:
    """Copy a model's folder with one other number in its weights."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_numbers_that_a_format_cannot_hold_are_refused(model_folder: Path, tmp_path: Path) -> None:
    """Infinity would make every answer nonsense; bf16 reaches as far as f32."""
    large = change_weight(tmp_path / "large", model_folder, 1e5)
    message = refusal(large, tmp_path / "a.gguf")
    assert "model.layers.0.mlp.down_proj.weight: holds the number 1e+05, and f16 ends at 65504" in message
    assert "--type bf16" in message
    export(large, tmp_path / "a.gguf", type="bf16")
    broken = change_weight(tmp_path / "broken", model_folder, float("nan"))
    assert "holds numbers that are not finite" in refusal(broken, tmp_path / "b.gguf", type="f32")


def test_a_disk_that_is_full_leaves_nothing_behind(model_folder: Path, tmp_path: Path) -> None:
    """Here files may not grow beyond 50 KB, half of what is needed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        message = refusal(model_folder, tmp_path / "model.gguf", type="f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: " in message
    assert "make room, or name another disk" in message


# ---- what is printed ----


def test_what_was_written_and_how_it_is_run_are_printed(runs: dict[str, Path], tmp_path: Path) -> None:
    """R7, K31: the line for llama.cpp, and the Modelfile for Ollama beside the file, which answers greedily."""
    out = tmp_path / "made" / "模型 V2 (最终).gguf"
    done = command("export-gguf", str(runs["lora"]), str(out), "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    made = out.with_suffix(".Modelfile")
    lines = done.stdout.splitlines()
    assert lines[0] == f"GGUF file: {out} ({out.stat().st_size / 1e6:,.1f} MB)"
    assert lines[1] == f"llama.cpp: llama-cli -m '{out}' --jinja --temp 0"
    assert lines[2] == f"Ollama:    ollama create v2 -f '{made}' && ollama run v2"
    text = made.read_text(encoding="utf-8")
    assert "\n".join(lines[4:]) + "\n" == text
    assert text.startswith("FROM ./模型 V2 (最终).gguf\n")
    assert text.endswith("PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["模型 V2 (最终).Modelfile", "模型 V2 (最终).gguf"]


def test_a_vision_model_is_run_with_both_files(vision_run: Path, tmp_path: Path) -> None:
    """The notice says where llama.cpp looks at pictures otherwise."""
    done = command("export-gguf", str(vision_run), str(tmp_path / "v.gguf"))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("llama.cpp:"))
    assert f"-m {tmp_path}/v.gguf --mmproj {tmp_path}/mmproj-v.gguf" in line
    assert (tmp_path / "v.Modelfile").read_text(encoding="utf-8").startswith("FROM ./v.gguf\nFROM ./mmproj-v.gguf\n")
    assert "a picture that is not square" in done.stderr
