"""Measuring models without training: the numbers that their runs logged, several models at once, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm_edge_ft.deploy.evaluate import evaluate
from glm_edge_ft.errors import UserError
from glm_edge_ft.training.metrics import METRIC_NAMES
from tests.deploy.conftest import KINDS, command
from tests.runs import metrics, predictions

NUMBERS = ("test_loss", *(f"test_{name}" for name in METRIC_NAMES))


def logged(output: Path) -> dict[str, float]:
    """Return what a run logged of its test data."""
    (line,) = (line for line in metrics(output) if "test_loss" in line)
    return {name: line[name] for name in NUMBERS}


def written(out: Path) -> list[dict[str, Any]]:
    """Return the numbers that an evaluation wrote, one dict a model."""
    return [{name: line[name] for name in NUMBERS} for line in metrics(out)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gets_the_numbers_that_its_run_logged(
    kind: str, runs: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E2, E4: exactly, and the same predictions, for the output folder and its last checkpoint."""
    models = (str(runs[kind]), str(runs[kind] / "checkpoint-6"))
    evaluate(data / "test.jsonl", models, tmp_path / "out")
    assert written(tmp_path / "out") == [logged(runs[kind])] * 2
    for label in (kind, f"{kind}-checkpoint-6"):
        assert predictions(tmp_path / "out", label) == predictions(runs[kind])
    assert [line["step"] for line in metrics(tmp_path / "out")] == [None, 6]
    table = capsys.readouterr().out
    assert all(f"{model}  " in table for model in models)
    assert table.count(f"{logged(runs[kind])['test_loss']:.4f}") == 2


def test_a_vision_run_gets_its_numbers_too(vision_run: Path, vision_data: Path, tmp_path: Path) -> None:
    """I2: rows with and without images, LoRA on the vision part."""
    evaluate(vision_data / "test.jsonl", (str(vision_run),), tmp_path / "out")
    assert written(tmp_path / "out") == [logged(vision_run)]
    assert predictions(tmp_path / "out", "lora") == predictions(vision_run)


def test_a_base_model_is_measured_as_the_run_beside_it(
    runs: dict[str, Path], model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings are those of the run, said once; the table has both, in the order of the command line."""
    evaluate(data / "test.jsonl", (str(model_folder), str(runs["lora"])), tmp_path / "out")
    base, lora = written(tmp_path / "out")
    assert lora == logged(runs["lora"])
    assert base["test_loss"] > lora["test_loss"]
    assert f"with the settings of {runs['lora'] / 'run.json'}" in capsys.readouterr().err
    assert max(len(row["prediction"]) for row in predictions(tmp_path / "out", model_folder.name)) < 100


def test_a_config_goes_before_the_runs_settings(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """`--config` and `--set`; a DeepSpeed file that the config names need not be here."""
    config = {
        "data_config": {"train_file": "train.jsonl"},
        "training_args": {"output_dir": "x", "deepspeed": "none.json", "generation_config": {"max_new_tokens": 3}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    model, out = (str(runs["lora"]),), tmp_path / "out"
    evaluate(data / "test.jsonl", model, out, path)
    shorter = predictions(out, "lora")
    full = predictions(runs["lora"])
    assert all(long["prediction"].startswith(short["prediction"]) for long, short in zip(full, shorter, strict=True))
    assert shorter != full
    evaluate(data / "test.jsonl", model, out, None, ("training_args.generation_config.max_new_tokens=3",))
    assert predictions(out, "lora") == shorter


def test_nothing_is_written_over(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """A second evaluation moves the first one aside; a run's folder is no place for either."""
    arguments = (data / "test.jsonl", (str(runs["lora"]),), tmp_path / "out")
    evaluate(*arguments)
    first = (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8")
    evaluate(*arguments)
    assert (tmp_path / "out/earlier/1/metrics.jsonl").read_text(encoding="utf-8") == first
    assert predictions(tmp_path / "out/earlier/1", "lora") == predictions(tmp_path / "out", "lora")
    with pytest.raises(UserError, match="is the output folder of a run"):
        evaluate(data / "test.jsonl", (str(runs["lora"]),), runs["full"])


def test_all_mistakes_are_listed_at_once_before_anything_heavy(tmp_path: Path) -> None:
    """Exit 2: the file, both models, the folder, the config."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    names = [str(tmp_path / name) for name in ("none.jsonl", "a", "b", "file", "none.yaml")]
    done = command("evaluate", *names[:3], "--out", names[3], "--config", names[4])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 5 problems in the input\n")
    for text in (f"DATA_FILE {names[0]}: there is no such file", f"--out {names[3]}: is a file", *names[1:3], names[4]):
        assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_several_processes_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would measure all of it, and all would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun: starts several processes"):
        evaluate(data / "test.jsonl", ("glm-edge-nano",), tmp_path / "out")


def test_a_model_that_cannot_be_opened_stops_all_before_the_first_is_measured(
    runs: dict[str, Path], model_folder: Path, data: Path, tmp_path: Path
) -> None:
    """A cut weight file of the second model; no folder is made."""
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="its weights cannot be read"):
        evaluate(data / "test.jsonl", (str(runs["lora"]), str(broken)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_refused_by_line(runs: dict[str, Path], tmp_path: Path) -> None:
    """D2: as in training, before the weights are read."""
    (tmp_path / "bad.jsonl").write_text(json.dumps({"message": []}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: .*message"):
        evaluate(tmp_path / "bad.jsonl", (str(runs["lora"]),), tmp_path / "out")
