"""DeepSpeed's JSON beside the YAML: what contradicts, what cannot work, what the toolkit fills in (cases C6, T4)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.config.deepspeed import AUTO, complete_deepspeed, deepspeed_keys, find, read_deepspeed
from tests.config.files import load, refused

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = ("ds_zero_2.json", "ds_zero_3.json", "ds_zero_2_offload.json", "ds_zero_3_offload.json")
WHERE = "run.yaml:6: training_args.deepspeed"


def contradictions(folder: Path, settings: Any, training: str = "") -> list[tuple[str, str]]:
    """Return what is wrong with a JSON file, and how to mend it, beside a config with these `training_args`."""
    (folder / "ds.json").write_text(json.dumps(settings), encoding="utf-8")
    problems = refused(folder, "deepspeed: ds.json\n" + training)
    assert {problem.where for problem in problems} == {WHERE}
    return [(problem.what, problem.fix) for problem in problems]


def accepted(folder: Path, settings: Any, training: str = "") -> None:
    """Load a config that names such a JSON file; it is refused by an error."""
    (folder / "ds.json").write_text(json.dumps(settings), encoding="utf-8")
    load(folder, "deepspeed: ds.json\n" + training)


# --- the shipped files
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_agrees_with_any_yaml(name: str, tmp_path: Path) -> None:
    """C6: no value of the YAML can contradict a shipped file."""
    training = "learning_rate: 3e-4\nmax_grad_norm: 0.3\nweight_decay: 0.2\nadam_beta1: 0.8\nadam_epsilon: 1e-6\n"
    training += "per_device_train_batch_size: 3\ngradient_accumulation_steps: 5\nwarmup_steps: 0.1\nbf16: true"
    load(tmp_path, f"deepspeed: {CONFIGS / name}\n{training}")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_leaves_to_the_yaml_what_it_decides(name: str) -> None:
    """C6: batch sizes, accumulation, clipping, and precision are "auto"; no optimizer is named."""
    settings = json.loads((CONFIGS / name).read_text(encoding="utf-8"))
    keys = ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping"]
    keys += ["bf16.enabled", "fp16.enabled", "zero_optimization.reduce_bucket_size"]
    assert not {"optimizer", "scheduler"} & set(settings)
    assert {key: find(settings, key) for key in keys} == dict.fromkeys(keys, "auto")
    assert settings["zero_optimization"]["stage"] == int(name[8])


# --- contradictions
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_precision_that_the_machine_decides_cannot_stand_in_the_json(name: str, tmp_path: Path) -> None:
    """C6: the YAML is silent, so that the precision is not known yet."""
    ((what, fix),) = contradictions(tmp_path, {name: {"enabled": True}})
    assert what == f"ds.json: {name}.enabled is set, but {name} is not, so that the machine decides"
    assert fix == f'write "auto" there, or {name}: true in the YAML'


@pytest.mark.parametrize(
    ("settings", "training", "what"),
    [
        ({"optimizer": {"type": "Lion"}}, "", "optimizer.type is `Lion`, but optim is adamw_torch"),
        ({"optimizer": {"type": "AdamW"}}, "optim: adafactor", "optimizer.type is `AdamW`, but optim is adafactor"),
        ({"scheduler": {"type": "OneCycle"}}, "", "scheduler.type is `OneCycle`, but lr_scheduler_type is linear"),
    ],
)
def test_optimizer_or_schedule_that_would_win_in_silence_is_refused(
    settings: Any, training: str, what: str, tmp_path: Path
) -> None:
    """C6: transformers takes the JSON's optimizer and schedule without a word about the YAML's."""
    ((found, fix),) = contradictions(tmp_path, settings, training)
    assert found == f"ds.json: {what}"
    assert fix.startswith(f"leave {what.partition('.')[0]} out of the JSON")


# --- what cannot work
@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"stage": 4}, "stage is `4`", "write a number at most 3"),
        ({"stage": "3"}, 'stage is `"3"`', "write a whole number"),
        ({"stage": True}, "stage is `true`", "write a whole number"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param has no effect at stage 2", "leave it out"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.nvme_path: missing", "name a folder"),
        (
            {"stage": 2, "offload_optimizer": {"device": "gpu"}},
            'offload_optimizer.device is `"gpu"`',
            "did you mean cpu?",
        ),
    ],
)
def test_section_of_zero_that_cannot_work_is_refused(settings: Any, what: str, fix: str, tmp_path: Path) -> None:
    """C6: before any weights are read, with what to write instead."""
    ((found, instead),) = contradictions(tmp_path, {"zero_optimization": settings})
    assert found == f"ds.json: zero_optimization.{what}"
    assert instead.startswith(fix)


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"zero_optimization": {"overlap_com": True}}, "`zero_optimization.overlap_com`", "did you mean overlap_comm?"),
        ({"zero_optimisation": {"stage": 2}}, "`zero_optimisation`", "did you mean zero_optimization?"),
        ({"amp": {"enabled": True}}, "`amp`", "leave it out, and write bf16: true or fp16: true in the YAML"),
    ],
)
def test_key_that_is_not_supported_is_refused(settings: Any, what: str, fix: str, tmp_path: Path) -> None:
    """C6: with the nearest name, or what does the same here."""
    assert contradictions(tmp_path, settings) == [(f"ds.json: {what} is not supported", fix)]


def test_number_written_as_a_text_is_shown_as_one(tmp_path: Path) -> None:
    """C6: else the message would name the same value twice."""
    ((what, fix),) = contradictions(tmp_path, {"train_micro_batch_size_per_gpu": "8"})
    assert (what, fix) == ('ds.json: train_micro_batch_size_per_gpu is `"8"`', "write a number, or leave it out")


def test_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """C6, C4: the parser would take the last one without a word."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "stage": 3}}', encoding="utf-8")
    (problem,) = refused(tmp_path, "deepspeed: ds.json")
    assert problem.what == "`ds.json` states the key `stage` twice in one place"


def test_settings_inside_the_yaml_are_checked_too(tmp_path: Path) -> None:
    """C6: DeepSpeed's settings may stand in the YAML itself."""
    (problem,) = refused(tmp_path, "deepspeed: {zero_optimization: {stage: 9}}")
    assert problem.what == "deepspeed: zero_optimization.stage is `9`"


def test_keys_that_are_used_are_known_to_deepspeed() -> None:
    """K5: a key that another version no longer knows would end each run that names it."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    parsers: dict[str, Any] = {"zero_optimization": DeepSpeedZeroConfig}
    parsers |= {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    parsers["zero_optimization.offload_optimizer"] = DeepSpeedZeroOffloadOptimizerConfig
    parsers["zero_optimization.offload_param"] = DeepSpeedZeroOffloadParamConfig

    def fields_of(section: str) -> Any:
        key = deepspeed_keys()[section.partition(".")[0]]
        return (key.fields[section.partition(".")[2]] if "." in section else key).fields

    for section, parser in parsers.items():
        assert set(fields_of(section)) <= {field.alias or name for name, field in parser.model_fields.items()}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.cpu_offload"),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, "zero_optimization.cpu_offload_param"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "zero_optimization.mics_shard_size"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "nvm_path": "x"}}}, "nvm_path"),
        ({"zero_optimization": []}, "zero_optimization"),
        ({"zero_optimization": "stage 2"}, "zero_optimization"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": None}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": [2]}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}}, "offload_optimizer.device"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": ["cpu"]}}}, "offload_optimizer.device"),
        ({"optimizer": "AdamW"}, "optimizer"),
        ({"optimizer": {"type": ["AdamW"]}}, "optimizer.type"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 1e-6}}}, "scheduler.params.warmup_min_lr"),
        ({"scheduler": ["WarmupLR"]}, "scheduler"),
        ({"fp16": True}, "fp16"),
        ({"bf16": "yes"}, "bf16"),
        ({"gradient_clipping": {"value": 1}}, "gradient_clipping"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": []}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 10**400}}, "zero_optimization.sub_group_size"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": float("nan")}}, "zero_optimization.sub_group_size"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"pin_memory": "x"}}}, "offload_optimizer.pin_memory"),
        ({"communication_data_type": 16}, "communication_data_type"),
        ({"steps_per_print": "often"}, "steps_per_print"),
        ({"train_batch_size": [8]}, "train_batch_size"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing"),
        ({"data_types": "fp32"}, "data_types"),
        ({"checkpoint": 3}, "checkpoint"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"wandb": {"enabled": True}}, "wandb"),
        ({"compile": {"deepcompile": True}}, "compile"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
    ],
)
def test_what_was_never_tried_is_refused_by_its_key(settings: Any, key: str, tmp_path: Path) -> None:
    """K5: deprecated, removed and foreign features, and sections and values of the wrong type."""
    ((what, fix),) = contradictions(tmp_path, settings)
    assert re.match(rf"ds\.json: `?([\w.]+\.)?{re.escape(key)}`? is ", what)
    assert fix


def test_keys_that_switch_nothing_on_may_stand_in_the_json(tmp_path: Path) -> None:
    """K5: many files have them; DeepSpeed, which refuses some by their name alone, does not see them."""
    settings = {
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "amp": {"enabled": False, "opt_level": "O1"},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "elasticity": None,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_optimization": {
            "stage": 3,
            "mics_shard_size": -1,
            "cpu_offload": False,
            "zero_quantized_weights": False,
            "zero_hpz_partition_size": 1,
            "sub_group_size": "auto",
            "reduce_bucket_size": "auto",
            "offload_param": None,
            "offload_optimizer": {"device": "none", "pipeline_read": False},
        },
    }
    accepted(tmp_path, settings)
    done = completed(settings)
    assert done["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "none"},
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert not {"amp", "elasticity", "activation_checkpointing"} & set(done)


def test_steps_cannot_be_left_out_under_deepspeed(tmp_path: Path) -> None:
    """K7: DeepSpeed has taken a step before its gradient is looked at; without DeepSpeed `warn` stands."""
    (tmp_path / "ds.json").write_text("{}", encoding="utf-8")
    (problem,) = refused(tmp_path, "deepspeed: ds.json", overrides=("on_nonfinite_loss=warn",))
    assert problem.where == "--set on_nonfinite_loss"
    load(tmp_path, "learning_rate: 1e-3", overrides=("on_nonfinite_loss=warn",))


# --- what the toolkit fills in
def completed(settings: dict[str, Any], has_gpu: bool = True, bf16: bool = True) -> dict[str, Any]:
    """Complete settings, on a GPU with bf16 unless the arguments say otherwise."""
    return complete_deepspeed(settings, has_gpu=has_gpu, bf16=bf16, fp16=False)


def test_missing_keys_follow_the_yaml() -> None:
    """C6: an empty JSON gets every key whose value the YAML decides."""
    assert completed({}) == {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 0},
    }


@pytest.mark.parametrize("written", [{}, {"stage3_gather_16bit_weights_on_model_save": False}])
def test_weights_are_gathered_for_saving_at_stage_3(written: dict[str, Any]) -> None:
    """T4: the gather flag is set where the JSON lacks it or switches it off."""
    zero = completed({"zero_optimization": {"stage": 3, **written}})["zero_optimization"]
    assert zero == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


def test_stage_2_gets_no_gather_flag() -> None:
    """T4: it has a meaning at stage 3 alone."""
    assert completed({"zero_optimization": {"stage": 2}})["zero_optimization"] == {"stage": 2}


def test_settings_given_are_not_changed() -> None:
    """T4: the JSON's content stays as it was read, for the record of the run."""
    settings = json.loads((CONFIGS / "ds_zero_3_offload.json").read_text(encoding="utf-8"))
    before = json.dumps(settings)
    completed(settings, has_gpu=False)
    assert json.dumps(settings) == before


def test_no_gpu_means_nothing_pinned_or_overlapped() -> None:
    """C7: the same file serves a machine without a GPU."""
    settings = json.loads((CONFIGS / "ds_zero_3_offload.json").read_text(encoding="utf-8"))
    zero = completed(settings, has_gpu=False, bf16=False)["zero_optimization"]
    assert zero["overlap_comm"] is False
    assert (zero["offload_optimizer"]["pin_memory"], zero["offload_param"]["pin_memory"]) == (False, False)


def test_settings_are_read_from_a_file_or_taken_as_they_are(tmp_path: Path) -> None:
    """C6: both ways to write them lead to the same, a byte order mark included."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8-sig")
    from_file = read_deepspeed(str(tmp_path / "ds.json"))
    assert from_file == read_deepspeed({"zero_optimization": {"stage": 2}}) == {"zero_optimization": {"stage": 2}}


def test_precision_keeps_the_other_settings_of_its_section() -> None:
    """C7: a loss scale stays beside the switch that the toolkit sets."""
    done = complete_deepspeed({"fp16": {"enabled": AUTO, "loss_scale": 128}}, has_gpu=True, bf16=False, fp16=True)
    assert (done["fp16"], done["bf16"]) == ({"enabled": True, "loss_scale": 128}, {"enabled": False})


def test_optimizer_and_schedule_are_the_yamls_own() -> None:
    """C6: what the JSON says of them agrees with the YAML; DeepSpeed's own would take other values."""
    done = completed({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupCosineLR"}})
    assert not {"optimizer", "scheduler"} & set(done)


def test_offloaded_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    """C6: accelerate would put Adam in its place."""
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert contradictions(tmp_path, settings, "optim: adafactor") == [
        (
            "ds.json: zero_optimization.offload_optimizer works with AdamW alone, but optim is adafactor",
            "write optim: adamw_torch, or leave offload_optimizer out of the JSON",
        )
    ]
