"""The code in glm_edge_ft/deploy/README.md that loads the results of a run, and what a run's output folder holds."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.conftest import TokenizerMaker
from tests.documents import DEPLOY, ROOT, TEXTS, blocks
from tests.model_folders import save_model_folder
from tests.runs import LORA, PREFIX, do_run, metrics
from tests.vision_folders import draw, image_part, save_vision_folder, text_part, turns

QUESTION = "类型#裤*版型#宽松*颜色#黑色"
LEARNS: dict[str, Any] = {"generation_config": {"max_new_tokens": 128}, "learning_rate": 3e-2, "max_steps": 4}

# The files of a run, as README lists them; earlier/ is there after an earlier run, the other for a vision model.
OF_AN_ADAPTER = ["adapter_model.safetensors", "adapter_config.json"]
OF_THE_MODEL = ["model.safetensors", "config.json"]
(OUTPUT_TABLE,) = re.findall(r"^\| in `output_dir` .*\n((?:^\|.*\n)+)", TEXTS[ROOT / "README.md"], flags=re.MULTILINE)
FILES = {name for line in OUTPUT_TABLE.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
FILES -= {"earlier/", "preprocessor_config.json"}


def snippet(kind: str) -> str:
    """Return the code that loads `output/KIND`."""
    (found,) = (block for block in blocks(DEPLOY, "python") if f'"output/{kind}"' in block)
    return found


def answer(kind: str, output: Path, capsys: pytest.CaptureFixture[str], image: Path | None = None) -> str:
    """Run the code that loads a folder of this kind; expect and return what the evaluation of the run predicted."""
    capsys.readouterr()
    code = snippet(kind).replace(f'"output/{kind}"', repr(str(output))).replace('"images/dog.jpg"', repr(str(image)))
    exec(code, {})
    (prediction,) = (output / "predictions" / "test-4.jsonl").read_text(encoding="utf-8").splitlines()
    printed = capsys.readouterr().out.strip()
    assert printed == json.loads(prediction)["prediction"].strip()
    return printed


def untrained_reply(folder: Path) -> str:
    """Return what a model answers before it is trained, by the code that loads a model."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet("sft").replace('"output/sft"', repr(str(folder))), {})
    return printed.getvalue().strip()


def test_snippets_answer_as_the_evaluation_did(
    tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R7, T1: the code loads each kind of output folder and replies as predictions/ says.

    The folder holds what README lists, metrics.jsonl the keys that it names.
    """
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(turns(QUESTION, "你喜欢什么颜色？")), encoding="utf-8")
    said = set()
    for kind, peft in (("lora", LORA), ("sft", None), ("prefix", PREFIX)):
        data: dict[str, Any] = {"peft": peft, "val": "train.jsonl", "test": "train.jsonl"}
        evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
        output = do_run(tmp_path / kind, tmp_path / "data", tmp_path / "model", **data, **LEARNS, **evaluated)
        said.add(answer(kind, output, capsys))
        names = {name.rstrip("/").replace("N", "4") for name in FILES - set(OF_THE_MODEL if peft else OF_AN_ADAPTER)}
        assert [name for name in names if not (output / name).exists()] == []
        assert {path.name for path in output.iterdir()} == {name.split("/")[0] for name in names}
    logged = {key for line in metrics(output) for key in line}
    assert {"step", "loss", "learning_rate", "eval_loss", "eval_rouge-l", "train_runtime"} <= logged
    assert QUESTION in snippet("sft")
    assert untrained_reply(tmp_path / "model") not in said


def test_the_vision_snippet_answers_as_the_evaluation_did(
    tmp_path: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R7: adapter, tokenizer and image processor of the output folder, and the base model that it names."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    model = save_vision_folder(tmp_path / "model", backend)
    (question,) = re.findall(r'"text": "([^"]+)"', snippet("vision"))
    image = draw(tmp_path / "data" / "dog.png", 1)
    row = turns([image_part("dog.png"), text_part(question)], "今天天气很好")
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    output = do_run(tmp_path / "output", tmp_path / "data", model, test="train.jsonl", takes_images=True, **LEARNS)
    assert answer("vision", output, capsys, image)
    assert (output / "preprocessor_config.json").is_file()
