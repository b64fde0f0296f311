"""Short real runs, each with predictions on its test file, for what is done with their models afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder
from tests.runs import LORA, PREFIX, do_run, predictions, write_jsonl
from tests.vision_folders import save_vision_folder, write_vision_data

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, Any] | None] = {
    "lora": {**LORA, "r": 16, "target_modules": "all-linear"},
    "full": None,
    "prefix": PREFIX,
}
RATES = {"lora": 1.75e-2, "full": 5e-3, "prefix": 3e-2}
TURNS = (
    ("hello there", "hello my friend"),
    ("how are you", "I am fine"),
    ("今天天气", "今天天气很好"),
    ("what is the time now?", "我们去公园散步吧。"),
)


def command(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m glm_edge_ft ARGUMENTS` from the repository, `given` on its stdin."""
    return subprocess.run(
        [sys.executable, "-m", "glm_edge_ft", *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep encoded data out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path_factory.getbasetemp() / "deploy-cache"))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return the folder of a tiny model."""
    return save_model_folder(tmp_path_factory.mktemp("model"), make_tokenizer("glm"))


@pytest.fixture(scope="session")
def nano() -> Path:
    """Return the folder of the embedded chat model."""
    return EMBEDDED_MODELS["glm-edge-nano"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of single turns, and of talks of two and more."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = []
    for count in (1, 1, 2, 4):
        messages: list[dict[str, str]] = []
        for question, answer in TURNS[:count] if count > 1 else TURNS[len(rows) : len(rows) + 1]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    for name in ("train", "test"):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data: Path) -> dict[str, Path]:
    """Return the output folder of a run of each kind of fine-tuning, whose model has moved away from its base."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        outputs = {
            kind: do_run(folder / kind, data, model_folder, peft=peft, test="test.jsonl", learning_rate=RATES[kind])
            for kind, peft in KINDS.items()
        }
    for kind, output in outputs.items():  # else what is compared with them says little
        assert predictions(output)[0]["prediction"].strip(), f"{kind}: the first reply is empty, take another rate"
    return outputs


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory, backend: Tokenizer) -> Path:
    """Return the folder of a tiny vision model."""
    return save_vision_folder(tmp_path_factory.mktemp("vision-model"), backend)


@pytest.fixture(scope="session")
def vision_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of rows with an image, text rows, and rows of two turns."""
    return write_vision_data(tmp_path_factory.mktemp("vision-data"))


@pytest.fixture(scope="session")
def vision_run(tmp_path_factory: pytest.TempPathFactory, vision_model: Path, vision_data: Path) -> Path:
    """Return the output folder of a run on images, with LoRA in the vision part too."""
    folder = tmp_path_factory.mktemp("vision-runs")
    peft = {**LORA, "target_modules": ["q_proj", "v_proj", "fc1", "dense_4h_to_h"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM_EDGE_FT_CACHE", str(folder / "cache"))
        return do_run(
            folder / "lora",
            vision_data,
            vision_model,
            peft=peft,
            test="test.jsonl",
            learning_rate=3e-2,
            takes_images=True,
        )
