"""Runs whose model torch.compile translates first, against the same runs without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runs import LORA, assert_close, do_run, losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]
STEADY = LORA | {"lora_dropout": 0.0}


def test_a_compiled_run_learns_the_same(chat_folder: Path) -> None:
    """Losses, norms, evaluation and the saved adapter: those of the plain run, up to the order of summation."""
    plain, compiled = (
        do_run(
            chat_folder / name,
            chat_folder / "data",
            chat_folder / "model",
            peft=STEADY,
            val="dev.jsonl",
            eval_strategy="steps",
            eval_steps=6,
            torch_compile=name == "compiled",
        )
        for name in ("plain", "compiled")
    )
    assert len(losses(plain)) == 6
    assert_close(plain, compiled)


def test_a_compiled_run_goes_on_from_its_checkpoint(chat_folder: Path) -> None:
    """With dropout: what follows the checkpoint equals the uninterrupted compiled run."""
    data, model = chat_folder / "data", chat_folder / "model"
    whole = do_run(chat_folder / "whole", data, model, torch_compile=True)
    part = do_run(chat_folder / "part", data, model, torch_compile=True)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(part / name)
    do_run(part, data, model, resume="yes", torch_compile=True)
    for step in (3, 4, 5, 6):
        assert losses(part)[step] == pytest.approx(losses(whole)[step], rel=1e-4), step
