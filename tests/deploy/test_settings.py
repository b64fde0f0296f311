"""How a model is used after training: what of its run still counts, and what another machine cannot do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from glm_edge_ft.deploy.opening import prepare_use
from glm_edge_ft.deploy.settings import default_settings, settings_of_run
from glm_edge_ft.deploy.source import Source, find_source
from glm_edge_ft.errors import UserError
from tests.deploy.conftest import RATES


def with_record(runs: dict[str, Path], folder: Path, **training_args: object) -> Source:
    """Copy a run's folder, with other training arguments in its record."""
    shutil.copytree(runs["lora"], folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["config"]["training_args"] |= training_args
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return find_source(str(folder))


def test_lengths_batches_and_generation_are_the_runs(runs: dict[str, Path]) -> None:
    """What says how replies are made is kept, what says how to train is not."""
    config = settings_of_run(find_source(str(runs["lora"])))
    assert config is not None
    assert (config.max_input_length, config.max_output_length) == (256, 64)
    assert config.generation_config == {"max_new_tokens": 8}
    assert config.training_args["per_device_eval_batch_size"] == 2
    assert config.training_args["predict_with_generate"] is True
    assert (config.peft_config, config.training_args.get("learning_rate")) == (None, None)
    record = json.loads((runs["lora"] / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["training_args"]["learning_rate"] == RATES["lora"]


def test_a_model_without_a_run_has_defaults(model_folder: Path) -> None:
    """No record: room for a picture, replies of at most 512 tokens."""
    assert settings_of_run(find_source(str(model_folder))) is None
    config = default_settings()
    assert (config.max_input_length, config.max_output_length, config.generation_config) == (2048, 512, {})


def test_a_deepspeed_file_of_the_run_need_not_be_here(runs: dict[str, Path], tmp_path: Path) -> None:
    """C6: the run was on a cluster, with a file there."""
    config = settings_of_run(with_record(runs, tmp_path / "run", deepspeed="/cluster/ds_zero_3.json"))
    assert config is not None
    assert "deepspeed" not in config.training_args


def test_a_record_that_is_no_config_any_more_is_refused_by_name(runs: dict[str, Path], tmp_path: Path) -> None:
    """C1: written by another version; what to do is said."""
    source = with_record(runs, tmp_path / "run", no_such_key=1)
    with pytest.raises(UserError, match=r"run\.json: its config cannot be used: training_args\.no_such_key: "):
        settings_of_run(source)


def test_a_number_format_that_the_machine_lacks_is_left_out_with_a_notice(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C7: a run in fp16 on a GPU, used on a machine without one."""
    source = with_record(runs, tmp_path / "run", fp16=True, use_cpu=True)
    config = settings_of_run(source)
    assert config is not None
    prepared = prepare_use(source, config, takes_images=False, output_dir=tmp_path / "out", data_files={})
    assert prepared.precision.weights == "float32"
    assert "training_args.fp16 is true, but there is no GPU here" in capsys.readouterr().err
