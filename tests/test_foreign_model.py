"""A chat model of another family, from preview to merge: each row of the table in glm_edge_ft/deploy/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm_edge_ft import recipe
from glm_edge_ft.deploy.chat import chat
from glm_edge_ft.deploy.evaluate import evaluate
from glm_edge_ft.deploy.export_gguf import export_gguf
from glm_edge_ft.deploy.merge import merge
from glm_edge_ft.errors import UserError
from glm_edge_ft.run import RunRequest
from tests.foreign import call, save_chatml_folder, tool, tool_row, turn, write_rows
from tests.launch import ZERO_2, ZERO_3, launch
from tests.runs import LORA, PREFIX, do_run, losses, metrics, weights, write_config

QUESTION = "What is the weather in Paris?"
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SHORT = {
    "tools": [tool("get_weather")],
    "messages": [turn("user", QUESTION), turn("assistant", None, tool_calls=[call("get_weather", "Paris")])],
}
ROWS = [SHORT, {"messages": [turn("user", "What time is it?"), turn("assistant", "It is half past nine.")]}]
WIDE = {**LORA, "r": 16, "lora_alpha": 64, "lora_dropout": 0.0, "target_modules": "all-linear"}
SETTINGS: dict[str, Any] = {
    "test": "test.jsonl",
    "top": {"max_input_length": 1024, "max_output_length": 64},
    "predict_with_generate": True,
    "generation_config": {},
    "save_steps": 1000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the model, its data, and in `run` a LoRA that knows the short rows by heart."""
    folder = tmp_path_factory.mktemp("foreign")
    model = save_chatml_folder(folder / "model", embedding_std=0.5)
    data = write_rows(folder / "data", ROWS, "train.jsonl", "test.jsonl")
    write_rows(folder / "tools", [tool_row(), *ROWS], "train.jsonl", "dev.jsonl", "test.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        do_run(folder / "run", data, model, peft=WIDE, **{**SETTINGS, "max_steps": 120})
    return folder


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep encoded data out of the user's cache."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))


def plain_reply(model: Any, tokenizer: Any, messages: list[dict[str, Any]], **tools: Any) -> str:
    """Return what the model writes greedily, with transformers alone."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **tools
    )
    ids = model.eval().generate(**inputs, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_preview_shows_tool_calls_as_they_are_learned(folder: Path) -> None:
    """K22: ids are the template's, tools included; each reply bears loss whole, its calls too, and no tool's answer."""
    config = write_config(folder / "preview", **SETTINGS)
    found = folder / "preview.json"
    recipe.run(RunRequest(folder / "tools", str(folder / "model"), config, preview=1, json_path=found))
    (row,) = json.loads(found.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    raw = tool_row()
    whole = tokenizer.apply_chat_template(raw["messages"], tools=raw["tools"], tokenize=True, return_dict=False)
    assert row["input_ids"] == whole
    supervised = str(tokenizer.decode([label for label in row["labels"] if label != -100]))
    assert supervised.split("<|im_end|>")[:-1] == [
        CALLED + CALLED.replace("<tool", "\n<tool", 1).replace("get_weather", "get_time").replace("Paris", "London"),
        "It is sunny in Paris, and it is half past nine in London.",
        "I call a tool.\n" + CALLED.replace("Paris", "London"),
        "Rain.",
    ]


def test_it_learns_and_is_served_as_it_was_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own evaluation, `evaluate`, `chat`, plain PEFT and the merged model all give the learned replies."""
    run = folder / "run"
    own = metrics(run)[-1]
    assert own["test_exact-match"] == 100
    evaluate(folder / "data" / "test.jsonl", (str(run),), folder / "evaluation")
    (measured,) = metrics(folder / "evaluation")
    assert measured["test_exact-match"] == 100
    assert measured["test_loss"] == pytest.approx(own["test_loss"], rel=1e-4)
    capsys.readouterr()
    chat(str(run), prompt="What time is it?")
    assert capsys.readouterr().out == "It is half past nine.\n"
    merge(str(run), folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    models = {
        run: PeftModel.from_pretrained(base, run),
        folder / "merged": AutoModelForCausalLM.from_pretrained(folder / "merged"),
    }
    for place, model in models.items():
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert plain_reply(model, tokenizer, SHORT["messages"][:1], tools=SHORT["tools"]) == CALLED
        assert plain_reply(model, tokenizer, ROWS[1]["messages"][:1]) == "It is half past nine."
    with pytest.raises(UserError, match=r"(?s)is of the type qwen2, not a GLM-Edge.*convert_hf_to_gguf.py"):
        export_gguf(str(run), folder / "model.gguf")


KINDS: dict[str, dict[str, Any]] = {
    "padded": {"save_steps": 1},
    "padding_free": {"top": {**SETTINGS["top"], "padding_free": True}},
    "prefix": {"peft": PREFIX},
    "full": {"peft": None, "gradient_checkpointing": True},
    "nf4": {"top": {**SETTINGS["top"], "quantization": "nf4"}},
}


def test_every_kind_of_training(folder: Path) -> None:
    """LoRA, without padding, on 4 bits, PREFIX_TUNING and full: each trains, evaluates on both files, and saves."""
    for kind, changed in KINDS.items():
        settings = {
            **SETTINGS,
            "val": "dev.jsonl",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "max_steps": 2,
            **changed,
        }
        do_run(folder / kind, folder / "tools", folder / "model", **{"peft": {**LORA, "lora_dropout": 0.0}, **settings})
        names = {name for line in metrics(folder / kind) for name in line}
        assert {"eval_loss", "eval_exact-match", "test_loss", "test_exact-match"} <= names, kind
        assert list((folder / kind).glob("*model.safetensors")), kind
    for step, (loss, _, norm) in losses(folder / "padded").items():
        packed_loss, _, packed_norm = losses(folder / "padding_free")[step]
        assert packed_loss == pytest.approx(loss, rel=1e-3)
        assert packed_norm == pytest.approx(norm, rel=1e-2)
    straight = weights(folder / "padded")
    again = {**SETTINGS, "max_steps": 2, "save_steps": 1, "peft": {**LORA, "lora_dropout": 0.0}, "val": "dev.jsonl"}
    again |= {"eval_strategy": "steps", "eval_steps": 2, "resume": "1"}
    resumed = weights(do_run(folder / "padded", folder / "tools", folder / "model", **again))
    assert all(torch.equal(values, resumed[name]) for name, values in straight.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [ZERO_2, ZERO_3])
def test_on_two_processes(folder: Path, stage: str) -> None:
    """DeepSpeed's stages share such a model as any other: the losses of one process."""
    settings = {**SETTINGS, "max_steps": 2, "peft": {**LORA, "lora_dropout": 0.0}}
    one = do_run(folder / "one", folder / "data", folder / "model", **settings, per_device_train_batch_size=2)
    name = Path(stage).stem
    two = launch(folder / name, folder / "data", folder / "model", processes=2, deepspeed=stage, **settings,
                 per_device_train_batch_size=1)  # fmt: skip
    assert losses(two).keys() == losses(one).keys()
    for step, (loss, *_) in losses(one).items():
        assert losses(two)[step][0] == pytest.approx(loss, rel=1e-3)
