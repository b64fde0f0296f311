"""What MODEL_OR_CHECKPOINT may be, how an adapter finds its base model, and which settings of a run still count."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from glm_edge_ft.deploy.source import Source, default_settings, find_source, prepare_inference, run_settings
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS
from tests.deploy.conftest import RATES
from tests.runs import read_json, update_json


def refusal(name: Path | str, base: str | None = None) -> str:
    """Return the message that a name is refused with."""
    with pytest.raises(UserError) as caught:
        find_source(str(name), base)
    return str(caught.value)


def moved(output: Path, folder: Path, base: str) -> Path:
    """Copy an adapter's folder and let its config name `base`."""
    shutil.copytree(output, folder)
    update_json(folder / "adapter_config.json", base_model_name_or_path=base)
    return folder


def test_whole_models_are_found(model_folder: Path, runs: dict[str, Path]) -> None:
    """An embedded name, a hub id, a folder, the output folder of full fine-tuning and its checkpoint."""
    assert find_source("glm-edge-nano").location.source == str(EMBEDDED_MODELS["glm-edge-nano"])
    assert not find_source("THUDM/glm-edge-4b-chat").location.is_local
    assert find_source(str(model_folder)).location.source == str(model_folder)
    for name, step in (("", None), ("checkpoint-4", 4)):
        source = find_source(str(runs["full"] / name))
        assert (source.adapter, source.step) == (None, step)
        assert source.record == runs["full"] / name / "run.json"


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_adapter_finds_its_base_model(runs: dict[str, Path], model_folder: Path, kind: str) -> None:
    """R7: in the output folder and in a checkpoint, each with its record of the run."""
    for name, step in (("", None), ("checkpoint-4", 4)):
        source = find_source(str(runs[kind] / name))
        assert source.location.source == str(model_folder)
        assert source.location.adapter == runs[kind] / name
        assert (source.step, source.record) == (step, runs[kind] / name / "run.json")


def test_base_overrides_the_adapters_own(runs: dict[str, Path]) -> None:
    """`--base` wins."""
    source = find_source(str(runs["lora"]), "glm-edge-nano")
    assert source.location.source == str(EMBEDDED_MODELS["glm-edge-nano"])
    assert source.location.adapter == runs["lora"]


def test_the_record_helps_where_the_adapters_path_leads_nowhere(
    runs: dict[str, Path], model_folder: Path, tmp_path: Path
) -> None:
    """R7: the adapter came from another machine; its run.json has MODEL as it was written."""
    adapter = moved(runs["lora"], tmp_path / "adapter", "/not/here")
    assert find_source(str(adapter)).location.source == str(model_folder)
    (adapter / "run.json").unlink()
    assert refusal(adapter) == (
        f"MODEL {adapter}: its base model is not here any more: /not/here\n    -> give it: --base MODEL"
    )


def test_base_beside_a_whole_model_is_refused(model_folder: Path) -> None:
    """There is nothing that it could be the base of."""
    assert f"{model_folder} is a whole model" in refusal(model_folder, "glm-edge-nano")


def test_a_folder_without_a_model_lists_the_checkpoints_found(runs: dict[str, Path], tmp_path: Path) -> None:
    """A run that was killed before its end, the folder above several runs, and one inside of a run."""
    output = tmp_path / "all" / "killed"
    for step in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(runs["lora"] / step, output / step)
    listed = f"found there: {output / 'checkpoint-2'}, {output / 'checkpoint-4'}"
    for folder in (output, output.parent):
        assert "the folder holds neither a model nor an adapter" in refusal(folder)
        assert listed in refusal(folder)
    inside = refusal(runs["full"] / "predictions")
    assert f"found there: {runs['full']}, {runs['full'] / 'checkpoint-2'}" in inside
    (tmp_path / "empty").mkdir()
    assert f"no checkpoint was found in {tmp_path / 'empty'}" in refusal(tmp_path / "empty")


def test_a_checkpoint_that_is_not_there_lists_those_that_are(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2's kind: `output/checkpoint-9`, which could be a hub id by its form."""
    shutil.copytree(runs["lora"] / "checkpoint-2", tmp_path / "output" / "checkpoint-2")
    monkeypatch.chdir(tmp_path)
    assert refusal("output/checkpoint-9") == (
        "MODEL output/checkpoint-9: there is no such folder\n    -> found there: output/checkpoint-2"
    )


def test_broken_adapters_are_refused_by_file(runs: dict[str, Path], tmp_path: Path) -> None:
    """A cut weight file, none, and a config that is no JSON."""
    folder = tmp_path / "adapter"
    shutil.copytree(runs["lora"], folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights}: cannot be read: " in refusal(folder)
    weights.rename(folder / "adapter_model.bin")
    assert "a pickle, which can run code" in refusal(folder)
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "is no adapter config" in refusal(folder)


# ---- the settings of its run ----


def with_record(runs: dict[str, Path], folder: Path, **training_args: object) -> Source:
    """Copy a run's folder, with other training arguments in its record."""
    shutil.copytree(runs["lora"], folder)
    config = read_json(folder / "run.json")["config"]
    config["training_args"] |= training_args
    update_json(folder / "run.json", config=config)
    return find_source(str(folder))


def test_lengths_batches_and_generation_are_the_runs(runs: dict[str, Path]) -> None:
    """What says how replies are made is kept, what says how to train is not."""
    config = run_settings(find_source(str(runs["lora"])))
    assert config is not None
    assert (config.max_input_length, config.max_output_length) == (256, 64)
    assert config.generation_config == {"max_new_tokens": 8}
    assert config.training_args["per_device_eval_batch_size"] == 2
    assert config.training_args["predict_with_generate"] is True
    assert (config.peft_config, config.training_args.get("learning_rate")) == (None, None)
    record = read_json(runs["lora"] / "run.json")
    assert record["config"]["training_args"]["learning_rate"] == RATES["lora"]


def test_a_model_without_a_run_has_defaults(model_folder: Path) -> None:
    """No record: room for a picture, replies of at most 512 tokens."""
    assert run_settings(find_source(str(model_folder))) is None
    config = default_settings()
    assert (config.max_input_length, config.max_output_length, config.generation_config) == (2048, 512, {})


def test_a_deepspeed_file_of_the_run_need_not_be_here(runs: dict[str, Path], tmp_path: Path) -> None:
    """C6: the run was on a cluster, with a file there."""
    config = run_settings(with_record(runs, tmp_path / "run", deepspeed="/cluster/ds_zero_3.json"))
    assert config is not None
    assert "deepspeed" not in config.training_args


def test_a_record_that_is_no_config_any_more_is_refused_by_name(runs: dict[str, Path], tmp_path: Path) -> None:
    """C1: written by another version; what to do is said."""
    source = with_record(runs, tmp_path / "run", no_such_key=1)
    with pytest.raises(UserError, match=r"run\.json: its config cannot be used: training_args\.no_such_key: "):
        run_settings(source)


def test_a_number_format_that_the_machine_lacks_is_left_out_with_a_notice(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C7: a run in fp16 on a GPU, used on a machine without one."""
    source = with_record(runs, tmp_path / "run", fp16=True, use_cpu=True)
    config = run_settings(source)
    assert config is not None
    prepared = prepare_inference(source, config, takes_images=False, output_dir=tmp_path / "out", data_files={})
    assert prepared.precision.weights == "float32"
    assert "training_args.fp16 is true, but there is no GPU here" in capsys.readouterr().err
