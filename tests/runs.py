"""Whole runs in this process, their data and configs, and what they leave on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from glm_edge_ft import recipe
from glm_edge_ft.run import RunRequest

LORA: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1}
PREFIX: dict[str, Any] = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


QUESTIONS = (
    "hello there",
    "how are you",
    "what is the time now?",
    "你喜欢什么颜色",
    "今天天气",
    "fine?",
    "my friend, are you fine",
)
ANSWERS = ("hello my friend", "I am fine", "今天天气很好", "the time is now", "我们去公园散步吧。")


def conversation(number: int, turns: int = 1) -> dict[str, Any]:
    """Return a conversation of the given number of turns; each number gives another one, of another length."""
    messages = []
    for turn in range(turns):
        question = QUESTIONS[(number + turn) % len(QUESTIONS)] * (1 + number % 3)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": ANSWERS[(number * 2 + turn) % len(ANSWERS)]})
    return {"messages": messages}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write values one a line, and the folder where it is missing; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chat_data(folder: Path, train: int = 18) -> Path:
    """Write `train` training rows, 5 dev and 3 test rows of one or two turns; returns the folder."""
    for name, numbers in (("train", range(train)), ("dev", range(20, 25)), ("test", range(30, 33))):
        write_jsonl(folder / f"{name}.jsonl", (conversation(number, turns=1 + number % 2) for number in numbers))
    return folder


def write_config(
    output: Path,
    *,
    peft: Mapping[str, Any] | None = LORA,
    val: str | None = None,
    test: str | None = None,
    top: Mapping[str, Any] | None = None,
    **training_args: Any,
) -> Path:
    """Write the config of a run of six steps, unless the arguments say otherwise, beside its output folder.

    Args:
        output: the output folder.
        peft, val, test: the adapter, and the files to evaluate on.
        top: further keys of the config.
        training_args: laid over those of the run.
    """
    settings = {
        "output_dir": str(output),
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        # AdamW divides a gradient by its own size: one that is zero but for rounding would make a whole step.
        "adam_epsilon": 1e-5,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "disable_tqdm": True,
        "generation_config": {"max_new_tokens": 8},
        **training_args,
    }
    config = {
        "data_config": {"train_file": "train.jsonl", "val_file": val, "test_file": test},
        "max_input_length": 256,
        "max_output_length": 64,
        "training_args": settings,
        "peft_config": None if peft is None else dict(peft),
        **(top or {}),
    }
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def do_run(
    output: Path,
    data: Path,
    model: Path | str,
    *,
    resume: str | None = None,
    takes_images: bool = False,
    check: bool = False,
    **settings: Any,
) -> Path:
    """Do one run in this process and return its output folder.

    Args:
        output: the output folder.
        data: DATA_DIR.
        model: MODEL.
        resume: RESUME.
        takes_images: whether to run as finetune_vision.py does.
        check: whether to check alone.
        settings: those of `write_config`.
    """
    path = write_config(output, **settings)
    recipe.run(RunRequest(data, str(model), path, resume, check=check, takes_images=takes_images))
    return output


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def update_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(read_json(path) | values), encoding="utf-8")


def read_jsonl(path: Path) -> list[Any]:
    """Return the content of each line of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return read_jsonl(output / "metrics.jsonl")


def predictions(output: Path, name: str = "test-6") -> list[dict[str, Any]]:
    """Return the lines of a file of predictions."""
    return read_jsonl(output / "predictions" / f"{name}.jsonl")


def losses(output: Path) -> dict[int, tuple[float, float, float]]:
    """Return loss, learning rate and gradient norm of each training step."""
    return {
        line["step"]: (line["loss"], line["learning_rate"], line["grad_norm"])
        for line in metrics(output)
        if "loss" in line
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the saved weights of an adapter or a model."""
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def assert_same_bits(first: Path, second: Path) -> None:
    """Fail unless both folders hold the same weights, bit for bit."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def evaluation_losses(output: Path) -> list[float]:
    """Return the loss of each evaluation of the development set."""
    return [line["eval_loss"] for line in metrics(output) if "eval_loss" in line]


def assert_close(expected: Path, found: Path) -> None:
    """Fail unless two runs are the same but for rounding: logged losses and gradient norms, evaluations, weights.

    Numbers of the log may differ by 1e-4 of their size, weights by a hundredth of the way that they can go in six
    steps, so that the bounds do not depend on the processor.
    """
    assert losses(found).keys() == losses(expected).keys()
    for step, logged in losses(expected).items():
        assert losses(found)[step] == pytest.approx(logged, rel=1e-4), step
    assert evaluation_losses(found) == pytest.approx(evaluation_losses(expected), rel=1e-4)
    way = 6 * max(rate for _, rate, _ in losses(expected).values())
    one, other = weights(expected), weights(found)
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, rtol=0, atol=0.01 * way, msg=name)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: writing on fails as on a full disk."""
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
