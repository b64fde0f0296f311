"""A merged folder answers as the adapter did, loads without this project, and nothing is written over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from glm_edge_ft.deploy.merge import merge
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.adapters import apply_adapter
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from tests.conftest import TokenizerMaker
from tests.deploy.conftest import TURNS, command
from tests.deploy.test_chat import IMAGE_FIRST, answer
from tests.model_folders import save_model_folder
from tests.runs import LORA, PREFIX, do_run, predictions, read_json, update_json
from tests.vision_folders import save_vision_folder, write_vision_data

WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}


def copy_in(folder: Path, base: Path, dtype: torch.dtype) -> Path:
    """Copy a model's folder with its weights in another format."""
    shutil.copytree(base, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def plain_reply(folder: Path, question: str, length: int) -> str:
    """Return what plain transformers says with the folder alone, stopping by itself."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).removeprefix("\n")


def test_the_merged_model_says_what_the_adapter_said(runs: dict[str, Path], tmp_path: Path) -> None:
    """E5: greedy text, by plain transformers, from the output folder and a checkpoint."""
    for name in ("", "checkpoint-6"):
        out = tmp_path / f"merged-{name}"
        merge(str(runs["lora"] / name), out)
        for row in predictions(runs["lora"])[:2]:
            assert plain_reply(out, TURNS[row["line"] - 1][0], 8) == row["prediction"]


def test_the_folder_holds_all_that_is_needed_and_nothing_of_the_adapter(runs: dict[str, Path], tmp_path: Path) -> None:
    """R7: tokenizer, template, stop ids, the fields of the release; sharded where a file would grow too large."""
    merge(str(runs["lora"]), tmp_path / "out", max_shard_size="100KB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00005.safetensors"} <= names
    assert not any("adapter" in name for name in names)
    config = read_json(tmp_path / "out/config.json")
    assert {config["rope_theta"], config["partial_rotary_factor"], config["torch_dtype"]} == {10000.0, 1.0, "float32"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_weights_are_merged_in_float32_and_then_cast(runs: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    """E5: for a 16-bit base model each weight is the rounding of base + scaling * B @ A, computed apart."""
    base = copy_in(tmp_path / "base", model_folder, torch.bfloat16)
    merge(str(runs["lora"]), tmp_path / "out", base=str(base))
    merge(str(runs["lora"]), tmp_path / "wide", base=str(base), dtype="float32")
    merged, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wide"))
    adapter, before = load_file(runs["lora"] / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    first, second = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = before[f"{name}.weight"].float() + LORA["lora_alpha"] / 16 * (second @ first)
    torch.testing.assert_close(wide[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert all(torch.equal(merged[key], wide[key].to(torch.bfloat16)) for key in wide)
    assert read_json(tmp_path / "out/config.json")["torch_dtype"] == "bfloat16"


def test_modules_that_were_trained_whole_are_in_the_merged_model(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E5: `modules_to_save`, embeddings and head, as in the demonstration's config."""
    output = do_run(tmp_path / "run", data, model_folder, peft=LORA | WHOLE, test="test.jsonl")
    merge(str(output), tmp_path / "out")
    trained = load_file(output / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["lm_head.weight"], trained)
    row = predictions(output)[0]
    assert answer(capsys, tmp_path / "out", TURNS[0][0], generation={"max_new_tokens": 8}) == row["prediction"] + "\n"


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["q_proj"]], ids=["head", "neither"])
def test_tied_embeddings_stay_tied_only_where_both_are_as_before(
    targets: list[str], tmp_path: Path, make_tokenizer: TokenizerMaker
) -> None:
    """E5: a matrix on the head must not change the embeddings that share its weights."""
    base = save_model_folder(tmp_path / "base", make_tokenizer("glm"), tie_word_embeddings=True)
    before = load_file(base / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted: Any = apply_adapter(model, {**LORA, "target_modules": targets})
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(str(tmp_path / "adapter"), tmp_path / "out")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    after = load_file(tmp_path / "out/model.safetensors")
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(after[embeddings], before[embeddings])
    assert ("lm_head.weight" in after) is ("lm_head" in targets)


def test_a_vision_model_keeps_the_released_layout(
    vision_run: Path, vision_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E5: LoRA on the vision part too; the same keys as the base model's, its image processor, the same answers."""
    out = tmp_path / "out"
    merge(str(vision_run), out)
    before, after = (load_file(folder / "model.safetensors") for folder in (vision_model, out))
    assert before.keys() == after.keys()
    vision = "model.vision.adapter.linear_proj.dense_4h_to_h.weight"
    assert not torch.equal(before[vision], after[vision])
    assert (out / "preprocessor_config.json").read_bytes() == (vision_model / "preprocessor_config.json").read_bytes()
    load_glm_edge_v(out, torch.float32)
    (row, *_) = (row for row in predictions(vision_run) if "images" in row and IMAGE_FIRST.match(row["prompt"]))
    options: dict[str, Any] = {"image": row["images"][0], "generation": {"max_new_tokens": 8}}
    assert answer(capsys, out, "what is the colour?", **options) == row["prediction"] + "\n"


def test_code_that_the_release_names_goes_along(tmp_path: Path, backend: Tokenizer) -> None:
    """R7: `auto_map` and its Python files, which older tools need, and which nothing here runs."""
    base = save_vision_folder(tmp_path / "base", backend)
    auto_map = {"AutoModelForCausalLM": "modeling_glm.GlmForCausalLM"}
    update_json(base / "config.json", auto_map=auto_map)
    (base / "modeling_glm.py").write_text("raise AssertionError('run')\n", encoding="utf-8")
    data = write_vision_data(tmp_path / "data", train=4, others=1)
    output = do_run(tmp_path / "run", data, base, max_steps=1, save_strategy="no", takes_images=True)
    merge(str(output), tmp_path / "out")
    assert read_json(tmp_path / "out/config.json")["auto_map"] == auto_map
    assert (tmp_path / "out/modeling_glm.py").read_bytes() == (base / "modeling_glm.py").read_bytes()


def refusal(*arguments: Any, **options: Any) -> str:
    """Return the message that a merge is refused with."""
    with pytest.raises(UserError) as caught:
        merge(*arguments, **options)
    return str(caught.value)


def test_what_cannot_be_merged_is_refused_with_the_reason(runs: dict[str, Path], tmp_path: Path) -> None:
    """E5: a prefix, and models that are whole; nothing is left on disk."""
    assert PREFIX["peft_type"] in refusal(str(runs["prefix"]), tmp_path / "out")
    assert "changes no weights" in refusal(str(runs["prefix"]), tmp_path / "out")
    for name in (str(runs["full"]), "glm-edge-nano"):
        assert "there is nothing to merge" in refusal(name, tmp_path / "out")
    assert "does not fit" in refusal(str(runs["lora"]), tmp_path / "out", base="glm-edge-nano")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_base_model_is_refused(runs: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    """Its weights are no numbers that a change can be added to."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    update_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is stored in a quantized form" in refusal(str(runs["lora"]), tmp_path / "out", str(base))


def test_a_base_model_in_four_bits_is_dequantized(
    runs: dict[str, Path], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E5: the merged weights are the 4-bit ones as numbers, plus the adapter's change; the folder is a plain model."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "model.safetensors").unlink()
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    four_bits.llm_int8_skip_modules = ["lm_head", "down_proj"]  # the rows of `down_proj` are no whole blocks
    quantized: Any = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=four_bits)
    quantized.save_pretrained(base)
    merge(str(runs["lora"]), tmp_path / "merged", str(base), dtype="float32")
    assert "is stored in 4 or 8 bits" in capsys.readouterr().err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(runs["lora"] / "adapter_model.safetensors")
    settings = read_json(runs["lora"] / "adapter_config.json")
    numbers = dict(quantized.dequantize(torch.float32).named_parameters())
    changed = 0
    for name, values in merged.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = numbers[name].detach().float()
        if f"{prefix}.lora_A.weight" in adapter:
            change = adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
            expected = expected + change * settings["lora_alpha"] / settings["r"]
            changed += 1
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert changed
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json")


def test_a_folder_that_is_in_use_is_refused_and_both_mistakes_are_listed(tmp_path: Path) -> None:
    """Exit 2, before anything heavy; an empty folder is fine."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = command("merge", str(tmp_path / "none"), str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 2 problems in the input\n")
    assert f"OUT_DIR {tmp_path}: is not empty, and nothing is written over" in done.stderr
    assert "is a file" in refusal("glm-edge-nano", tmp_path / "file")
    assert "cannot be made" in refusal("glm-edge-nano", tmp_path / "file" / "below")


def test_an_empty_folder_is_taken(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what was written is said."""
    merge(str(runs["lora"]), tmp_path)
    assert f"merged model: {tmp_path} (" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").is_file()
