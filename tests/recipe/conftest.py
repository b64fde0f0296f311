"""Runs on a tiny chat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder
from tests.runs import (
    LORA,
    do_run,
    write_chat_data,
)

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return the folder of a tiny model."""
    return save_model_folder(tmp_path_factory.mktemp("model"), make_tokenizer("glm"))


@pytest.fixture
def run(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that does one run in this process and returns its output folder."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    data = write_chat_data(tmp_path / "data")

    def start(
        output: str = "output",
        peft: Mapping[str, Any] | None = LORA,
        resume: str | None = None,
        val: str | None = None,
        test: str | None = None,
        model: Path = model_folder,
        data_dir: Path = data,
        top: Mapping[str, Any] | None = None,
        **training_args: Any,
    ) -> Path:
        return do_run(
            tmp_path / output,
            data_dir,
            model,
            peft=peft,
            resume=resume,
            val=val,
            test=test,
            top=top,
            **training_args,
        )

    return start
