"""A run that stops after a step, wherever in an epoch, goes on as if it had not: weights, losses, evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.errors import RunStopped
from glm_edge_ft.training.checkpoints import find_checkpoints
from glm_edge_ft.training.termination import Termination
from tests.runs import assert_same_bits, do_run, losses, metrics

# 18 rows in batches of 2, two batches a step: an epoch has 5 steps, the last of one batch.
SHARED: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "no",
    "val": "dev.jsonl",
    "predict_with_generate": False,
}
EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2}
EVERY_EPOCH = {"eval_strategy": "epoch"}


def evaluations(output: Path) -> list[tuple[int, float]]:
    """Return step and loss of each evaluation."""
    return [(line["step"], line["eval_loss"]) for line in metrics(output) if "eval_loss" in line]


@pytest.mark.parametrize(
    ("step", "settings"),
    [(1, EVERY_TWO), (2, EVERY_TWO), (5, EVERY_EPOCH), (4, {**EVERY_TWO, "train_sampling_strategy": "random"})],
)
def test_a_run_that_stops_after_a_step_goes_on_as_if_it_had_not(
    chat_folder: Path, step: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch and at its end, also where an evaluation was due: the resumed run begins with it."""
    output, data, model = chat_folder / "output", chat_folder / "data", chat_folder / "model"
    calls = iter(range(1, 100))
    with monkeypatch.context() as patched:
        patched.setattr(Termination, "poll_stop", lambda _: next(calls) == step)
        patched.setattr(Termination, "poll_stop_async", lambda _: False)
        with pytest.raises(RunStopped, match=f"by SIGTERM after step {step} of 6; .*checkpoint-{step} is whole"):
            do_run(output, data, model, **SHARED, **settings)
    assert [found.step for found in find_checkpoints(output)] == [step]
    assert all(number < step for number, _ in evaluations(output))
    do_run(output, data, model, resume="yes", **SHARED, **settings)
    whole = do_run(chat_folder / "whole", data, model, **SHARED, **settings)
    assert evaluations(output) == evaluations(whole)
    assert losses(output) == losses(whole)
    assert_same_bits(output, whole)
