"""Whole runs on a tiny model: what is refused, said and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_edge_ft.errors import UserError
from tests.runs import (
    LORA,
    conversation,
    losses,
    write_jsonl,
)

Run = Callable[..., Path]


def test_dropped_rows_are_said_by_the_run_itself(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """M2: dropped, counted and named, also when the data comes from the cache."""
    rows = [conversation(number) for number in range(4)]
    rows[2]["messages"].insert(0, {"role": "system", "content": "hello there my friend " * 20})
    data = tmp_path / "with-system"
    write_jsonl(data / "train.jsonl", rows)
    for _ in range(2):
        run(max_steps=1, save_strategy="no", data_dir=data, top={"max_input_length": 40, "max_output_length": 8})
        assert "train: 1 rows dropped: train.jsonl:3: " in capsys.readouterr().err


def test_a_run_never_writes_over_a_model_that_is_not_its_own(run: Run, tmp_path: Path, model_folder: Path) -> None:
    """The output folder is MODEL itself, or above it, or holds another model, or is the data folder."""
    copy = tmp_path / "models" / "mine"
    shutil.copytree(model_folder, copy)
    for output, message in (
        (copy, "holds MODEL"),
        (copy.parent, "holds MODEL"),
        (tmp_path / "data", "is DATA_DIR"),
    ):
        with pytest.raises(UserError, match=f"training_args.output_dir: .* {message}"):
            run(model=copy, output_dir=str(output))
    with pytest.raises(UserError, match="holds a model that no run of this toolkit left there"):
        run(output_dir=str(copy))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be made or written to"):
        run(output_dir=str(tmp_path / "file" / "below"))


def test_settings_that_only_the_trainer_would_miss_are_refused_before_the_weights(run: Run) -> None:
    """Optimizer, schedule and reporting are built once for one parameter; all of them are listed."""
    with pytest.raises(UserError) as caught:
        run(optim="schedule_free_adamw", lr_scheduler_type="cosine_with_min_lr", report_to="wandb")
    assert [problem.where for problem in caught.value.problems] == [
        "training_args.optim",
        "training_args.lr_scheduler_type",
        "training_args.report_to",
    ]


def test_freezing_the_vision_tower_of_a_chat_model_is_said_to_mean_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """I6: `freezeV: true` in the chat script."""
    output = run(max_steps=1, save_strategy="no", top={"freezeV": True})
    assert "freezeV: true has no meaning here" in capsys.readouterr().err
    assert len(losses(output)) == 1


def test_more_loader_processes_than_cores_are_clamped(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """T7: `dataloader_num_workers: 1000`, with a notice."""
    output = run(max_steps=1, save_strategy="no", dataloader_num_workers=1000)
    assert "dataloader_num_workers 1000 -> " in capsys.readouterr().err
    assert len(losses(output)) == 1


def test_the_run_record_and_the_curve_are_written(run: Run) -> None:
    """`run.json` holds the resolved config, versions and data fingerprint; `loss.png` is a picture."""
    output = run(val="dev.jsonl", eval_strategy="steps", eval_steps=3)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["training_args"]["learning_rate"] == 0.01
    assert record["versions"]["transformers"]
    assert len(record["data"]["train"]["fingerprint"]) == 32
    assert (output / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(output.rglob("training_args.bin"))
    assert not list(output.rglob("README.md"))
    assert not (output / ".saving").exists()


def test_modules_that_do_not_exist_are_refused_before_the_weights_are_read(run: Run) -> None:
    """A LoRA config for another model: the real names are listed."""
    with pytest.raises(UserError, match=r"no module named 'query_key_value'(.|\n)*it has: down_proj"):
        run(peft={**LORA, "target_modules": ["query_key_value"]})


def test_rows_longer_than_the_model_takes_are_refused(run: Run, tmp_path: Path, model_folder: Path) -> None:
    """The limit of the checkpoint's config, before any weight is read."""
    short = tmp_path / "short"
    shutil.copytree(model_folder, short)
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}), encoding="utf-8")
    with pytest.raises(UserError, match=r"its longest row has \d+ tokens, the model takes 16"):
        run(model=short)


def test_nothing_asks_for_a_login(run: Run) -> None:
    """E6: reporting is off unless the config names a service."""
    output = run(max_steps=1, save_strategy="no")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["training_args"]["report_to"] in ("none", [], ["none"])


def test_tensorboard_works_with_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`report_to: tensorboard` writes what metrics.jsonl has, read back as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    output = run(max_steps=2, report_to="tensorboard", save_strategy="no")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx({step: loss for step, (loss, _, _) in losses(output).items()})
    assert list(shown) == [1, 2]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(events.Tags()["scalars"])
