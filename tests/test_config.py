"""The run configuration: old and mistyped names, types, ranges, combinations, `--set` (cases C1 to C6 and C8)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge_ft.config import DataConfig, RunConfig, check_data_files, load_config
from glm_edge_ft.config_names import OLD_TRAINING_NAMES, Renamed
from glm_edge_ft.config_schema import training_fields
from glm_edge_ft.errors import Problem, UserError

HEAD = "data_config:\n  train_file: train.jsonl\n  val_file: dev.jsonl\ntraining_args:\n  output_dir: ./output/x\n"
NO_EVALUATION = "data_config:\n  train_file: train.jsonl\n  val_file: null\ntraining_args:\n  output_dir: ./output/x\n"
LORA = "peft_config:\n  peft_type: LORA\n"
REPOSITORY = Path(__file__).resolve().parents[1]


def write(folder: Path, training: str = "", rest: str = "", head: str = HEAD) -> Path:
    """Write a valid config with more lines in `training_args` (from line 6 on) and at the top level after it."""
    path = folder / "run.yaml"
    path.write_text(head + indent(dedent(training).strip("\n"), "  ") + "\n" + dedent(rest), encoding="utf-8")
    return path


def load(
    folder: Path, training: str = "", rest: str = "", overrides: tuple[str, ...] = (), head: str = HEAD
) -> RunConfig:
    """Load such a config."""
    return load_config(write(folder, training, rest, head), overrides)


def refused(
    folder: Path, training: str = "", rest: str = "", overrides: tuple[str, ...] = (), head: str = HEAD
) -> tuple[Problem, ...]:
    """Return the problems of such a config, their places without the folder."""
    path = write(folder, training, rest, head)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return tuple(
        Problem(problem.where.replace(f"{folder}/", ""), problem.what, problem.fix) for problem in caught.value.problems
    )


def notices(config: RunConfig) -> list[str]:
    """Return the notices of a config, without the folder of its file."""
    return [notice.replace(f"{config.path.parent}/", "") for notice in config.notices]


# --- C1: absent, retired and mistyped keys


def test_freeze_defaults_to_false(tmp_path: Path) -> None:
    """C1: a config without freezeV runs."""
    assert load(tmp_path).freezeV is False


def test_retired_combine_is_ignored_with_one_notice(tmp_path: Path) -> None:
    """C1: the retired key `combine` is accepted."""
    config = load(tmp_path, rest="combine: true\n")
    assert notices(config) == [
        "run.yaml:7: combine: retired and ignored: every assistant turn of a conversation is always supervised"
    ]


def test_mistyped_key_names_the_nearest(tmp_path: Path) -> None:
    """C1: `max_imput_length` is refused with the key that was meant."""
    assert refused(tmp_path, rest="max_imput_length: 512\n") == (
        Problem("run.yaml:7: max_imput_length", "unknown key `max_imput_length`", "did you mean max_input_length?"),
    )


@pytest.mark.parametrize(
    ("training", "rest", "where", "fix"),
    [
        ("learning_rat: 1", "", "run.yaml:6: training_args.learning_rat", "did you mean learning_rate?"),
        (
            "generation_config:\n  max_new_token: 4",
            "",
            "run.yaml:7: training_args.generation_config.max_new_token",
            "did you mean max_new_tokens?",
        ),
        ("", LORA + "  lora_alfa: 4\n", "run.yaml:9: peft_config.lora_alfa", "did you mean lora_alpha?"),
        ("", "freeze_v: true\n", "run.yaml:7: freeze_v", "did you mean freezeV?"),
        ("", "peft_confg: null\n", "run.yaml:7: peft_confg", "did you mean peft_config?"),
        ("", "learning_rate: 1e-4\n", "run.yaml:7: learning_rate", "`learning_rate` belongs under training_args"),
        ("", "evaluation_strategy: no\n", "run.yaml:7: evaluation_strategy", "belongs under training_args"),
        ("", "train_file: x\n", "run.yaml:7: train_file", "`train_file` belongs under data_config"),
        ("max_input_length: 9", "", "run.yaml:6: training_args.max_input_length", "belongs at the top of the file"),
        ("max_new_tokens: 9", "", "run.yaml:6: training_args.max_new_tokens", "training_args.generation_config"),
        ("", LORA + "  num_virtual_tokens: 4\n", "run.yaml:9: peft_config.num_virtual_tokens", "leave it out"),
    ],
)
def test_unknown_key_says_what_was_meant(tmp_path: Path, training: str, rest: str, where: str, fix: str) -> None:
    """C1: unknown keys are refused in every section, with the nearest key or the section they belong to."""
    (problem,) = refused(tmp_path, training, rest)
    assert problem.where == where
    assert fix in problem.fix


def test_every_mistake_is_listed_in_the_order_of_lines(tmp_path: Path) -> None:
    """C1: all mistakes of one run are listed together."""
    found = refused(
        tmp_path, "learning_rate: fast\nmax_stepz: 3", "freezev: true\n" + LORA + "  r: 0\n", ("training_args.seed=-1",)
    )
    assert [problem.where for problem in found] == [
        "run.yaml:6: training_args.learning_rate",
        "run.yaml:7: training_args.max_stepz",
        "run.yaml:8: freezev",
        "run.yaml:11: peft_config.r",
        "--set training_args.seed",
    ]


def test_missing_required_keys_are_named(tmp_path: Path) -> None:
    """C1: train_file and output_dir must be there."""
    assert refused(tmp_path, head="", rest="data_config:\n  val_file: a.jsonl\ntraining_args:\n  seed: 1\n") == (
        Problem("run.yaml:2: data_config.train_file", "missing", "write train_file: train.jsonl or so"),
        Problem("run.yaml:4: training_args.output_dir", "missing", "write output_dir: ./output/NAME"),
    )


# --- C2: old names


def test_old_names_become_todays_with_one_notice_each(tmp_path: Path) -> None:
    """C2: evaluation_strategy, warmup_ratio, group_by_length and overwrite_output_dir."""
    config = load(
        tmp_path,
        """
        evaluation_strategy: steps
        warmup_ratio: 0.1
        group_by_length: true
        overwrite_output_dir: true
        """,
    )
    arguments = config.training_args
    assert (arguments["eval_strategy"], arguments["warmup_steps"]) == ("steps", 0.1)
    assert arguments["train_sampling_strategy"] == "group_by_length"
    assert not {"evaluation_strategy", "warmup_ratio", "group_by_length", "overwrite_output_dir"} & arguments.keys()
    assert notices(config) == [
        "run.yaml:6: training_args.evaluation_strategy: old name, read as eval_strategy: steps",
        "run.yaml:7: training_args.warmup_ratio: old name, read as warmup_steps: 0.1",
        "run.yaml:8: training_args.group_by_length: old name, read as train_sampling_strategy: group_by_length",
        "run.yaml:9: training_args.overwrite_output_dir: retired and ignored: a run without RESUME starts afresh in "
        "output_dir, one with RESUME goes on there",
    ]


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("evaluation_strategy: no", "eval_strategy", "no"),
        ("group_by_length: false", "train_sampling_strategy", "random"),
        ("gradient_checkpointing: true", "activation_checkpointing", True),
        ("no_cuda: true", "use_cpu", True),
        ("per_gpu_train_batch_size: 3", "per_device_train_batch_size", 3),
        ("per_gpu_eval_batch_size: '3'", "per_device_eval_batch_size", 3),
        ("adafactor: true", "optim", "adafactor"),
        ("optim: adamw_hf", "optim", "adamw_torch"),
        ("include_inputs_for_metrics: true", "include_for_metrics", ["inputs"]),
    ],
)
def test_old_name_keeps_its_meaning(tmp_path: Path, old: str, new: str, value: Any) -> None:
    """C2: further old names, values included, carry their meaning over with one notice."""
    config = load(tmp_path, old)
    assert config.training_args[new] == value
    assert len(config.notices) == 1


def test_old_name_is_a_name_the_library_no_longer_documents() -> None:
    """C2: the table of old names is not stale: what it maps to exists today."""
    targets = {old.new for old in OLD_TRAINING_NAMES.values() if isinstance(old, Renamed)}
    assert targets <= training_fields().keys()
    still_there = OLD_TRAINING_NAMES.keys() & training_fields().keys()
    # both are declared as deprecated aliases in transformers 5
    assert still_there == {"gradient_checkpointing", "gradient_checkpointing_kwargs"}


def test_old_and_new_name_that_differ_are_refused(tmp_path: Path) -> None:
    """C2: both names with different values: refused."""
    assert refused(tmp_path, "evaluation_strategy: steps\neval_strategy: epoch") == (
        Problem(
            "run.yaml:6: training_args.evaluation_strategy",
            "`steps` contradicts eval_strategy: `epoch`, today's name for the same setting",
            "keep eval_strategy only",
        ),
    )


def test_old_and_new_name_that_agree_are_accepted(tmp_path: Path) -> None:
    """C2: both names with the same value: a notice."""
    config = load(tmp_path, "evaluation_strategy: no\neval_strategy: 'no'")
    assert config.training_args["eval_strategy"] == "no"
    assert notices(config) == [
        "run.yaml:6: training_args.evaluation_strategy: old name for eval_strategy, which is given too with the same "
        "value"
    ]


def test_option_wins_over_the_files_other_name(tmp_path: Path) -> None:
    """C2: --set of today's name overrides an old name in the file, and the other way round."""
    new_wins = load(tmp_path, "evaluation_strategy: steps", overrides=("training_args.eval_strategy=epoch",))
    old_wins = load(tmp_path, "eval_strategy: steps", overrides=("training_args.evaluation_strategy=epoch",))
    assert new_wins.training_args["eval_strategy"] == old_wins.training_args["eval_strategy"] == "epoch"


def test_mistake_in_an_old_name_is_shown_under_the_name_written(tmp_path: Path) -> None:
    """C2: the message names the key that stands in the file."""
    (problem,) = refused(tmp_path, "evaluation_strategy: step")
    assert problem.where == "run.yaml:6: training_args.evaluation_strategy"
    assert problem.fix.startswith("did you mean steps?")


def test_warmup_ratio_of_one_is_not_one_step(tmp_path: Path) -> None:
    """C2: warmup_steps reads 1 as one step, so a ratio of 1 cannot be carried over."""
    (problem,) = refused(tmp_path, "warmup_ratio: 1.0")
    assert problem.what == "`1.0` is not a fraction from 0 to below 1"


def test_old_name_only_the_user_can_rewrite_is_refused(tmp_path: Path) -> None:
    """C2: a retired key whose meaning moved elsewhere says where to."""
    assert refused(tmp_path, "fsdp_min_num_params: 9") == (
        Problem(
            "run.yaml:6: training_args.fsdp_min_num_params",
            "`fsdp_min_num_params` is no longer a key",
            "write it inside fsdp_config, as min_num_params",
        ),
    )


def test_hub_token_is_printed_nowhere(tmp_path: Path) -> None:
    """C2: a secret stands neither in a notice nor in what run.json holds."""
    config = load(tmp_path, "push_to_hub_token: hf_secret")
    assert config.training_args["hub_token"] == "hf_secret"
    assert "hf_secret" not in json.dumps(config.resolved()) + "".join(config.notices)


# --- C3: no evaluation file


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_without_val_file_evaluation_is_off(tmp_path: Path, strategy: str) -> None:
    """C3: `val_file: null` switches evaluation off, with a notice for each key that wanted it."""
    config = load(tmp_path, f"eval_strategy: {strategy}\neval_on_start: true", head=NO_EVALUATION)
    assert (config.training_args["eval_strategy"], config.training_args["eval_on_start"]) == ("no", False)
    assert config.training_args["predict_with_generate"] is False
    assert notices(config) == [
        "run.yaml:6: training_args.eval_strategy: evaluation is off, since data_config names no val_file",
        "run.yaml:7: training_args.eval_on_start: evaluation is off, since data_config names no val_file",
    ]


def test_best_model_without_val_file_is_refused(tmp_path: Path) -> None:
    """C3: the best model cannot be found without evaluation."""
    assert refused(tmp_path, "eval_strategy: steps\nload_best_model_at_end: true", head=NO_EVALUATION) == (
        Problem(
            "run.yaml:7: training_args.load_best_model_at_end",
            "the best model is found by evaluation, but data_config names no val_file",
            "name a val_file and write eval_strategy: steps, or write load_best_model_at_end: false",
        ),
    )


@pytest.mark.parametrize("training", ["lr_scheduler_type: reduce_lr_on_plateau", "save_strategy: best"])
def test_what_follows_evaluation_needs_it(tmp_path: Path, training: str) -> None:
    """C3: other settings that live from evaluation are refused without it."""
    (problem,) = refused(tmp_path, training, head=NO_EVALUATION)
    assert "no val_file means no evaluation" in problem.what


# --- C4: types


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),
        ("learning_rate: 5E-5", "learning_rate", 5e-5),
        ("learning_rate: '5e-5'", "learning_rate", 5e-5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("per_device_train_batch_size: '8'", "per_device_train_batch_size", 8),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 010", "max_steps", 10),
        ("save_steps: 500", "save_steps", 500),
        ("save_steps: 0.5", "save_steps", 0.5),
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: off", "save_strategy", "no"),
        ("save_strategy: false", "save_strategy", "no"),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("logging_strategy: no", "logging_strategy", "no"),
        ("bf16: yes", "bf16", True),
        ("bf16: on", "bf16", True),
        ("bf16: 'false'", "bf16", False),
        ("tf32: null", "tf32", None),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("run_name: 12:30", "run_name", "12:30"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: no", "run_name", "no"),
        ("run_name: 实验一", "run_name", "实验一"),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("report_to: tensorboard", "report_to", "tensorboard"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("lr_scheduler_kwargs: '{\"num_cycles\": 2}'", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("debug: underflow_overflow", "debug", ["underflow_overflow"]),
        ("deepspeed: {zero_optimization: {stage: 2}}", "deepspeed", {"zero_optimization": {"stage": 2}}),
        ("include_num_input_tokens_seen: no", "include_num_input_tokens_seen", False),
        ("fsdp: true", "fsdp", True),
        ("trackio_static_space_id: false", "trackio_static_space_id", False),
        ("optim_target_modules: attn", "optim_target_modules", "attn"),
    ],
)
def test_value_takes_its_declared_type(tmp_path: Path, written: str, key: str, value: Any) -> None:
    """C4: values are read by the type that the field declares."""
    read = load(tmp_path, written).training_args[key]
    assert read == value
    assert type(read) is type(value)


def test_lora_alpha_in_exponent_form_is_a_whole_number(tmp_path: Path) -> None:
    """C4: `lora_alpha: 3.2e1` is 32."""
    config = load(tmp_path, rest=LORA + "  lora_alpha: 3.2e1\n")
    assert config.peft_config is not None
    assert config.peft_config["lora_alpha"] == 32
    assert isinstance(config.peft_config["lora_alpha"], int)


@pytest.mark.parametrize(
    ("training", "what", "fix"),
    [
        ("learning_rate: fast", "`fast` is not a number", "write a number; the default is 5e-05"),
        ("learning_rate: .nan", "`.nan` is not a finite number", "write a number; the default is 5e-05"),
        ("learning_rate: -.inf", "`-.inf` is not a finite number", "write a number; the default is 5e-05"),
        ("learning_rate: 1e999", "`1e999` is not a finite number", "write a number; the default is 5e-05"),
        ("learning_rate: '1e999'", "`1e999` is not a finite number", "write a number"),
        ("learning_rate: null", "`null` is not a number", "leave the key out for its default, or write a number"),
        ("learning_rate:", "an empty value is not a number", "leave the key out for its default, or write a number"),
        ("learning_rate: [1]", "`[1]` is not a number", "write a number; the default is 5e-05"),
        ("max_steps: true", "`true` is not a whole number", "write a whole number; the default is -1"),
        ("max_steps: 1.5", "`1.5` is not a whole number", "write a whole number; the default is -1"),
        ("bf16: 1", "`1` is not true or false", "write true or false; the default is False"),
        ("run_name: None", "`None` is a text in YAML", "write null"),
        ("lr_scheduler_kwargs: {a: .nan}", "`.nan` is not a finite number", "write "),
        ("parallelism_config: {a: 1}", "takes a Python object, which a YAML file cannot write", "leave it out"),
    ],
)
def test_value_of_another_type_is_refused(tmp_path: Path, training: str, what: str, fix: str) -> None:
    """C4: `learning_rate: fast` and its like: refused naming field, value and what to write."""
    (problem,) = refused(tmp_path, training)
    assert problem.where.startswith("run.yaml:6: training_args.")
    assert problem.what == what
    assert problem.fix.startswith(fix)


@pytest.mark.parametrize(
    ("training", "rest", "hint"),
    [
        ("eval_strategy: step", "", "did you mean steps? write one of no, steps, epoch"),
        ("lr_scheduler_type: Cosine", "", "did you mean cosine?"),
        ("optim: adam_torch", "", "did you mean adamw_torch?"),
        ("log_level: warn", "", "did you mean warning?"),
        ("train_sampling_strategy: grouped", "", "random, sequential, group_by_length"),
        ("debug: underflow", "", "did you mean underflow_overflow?"),
        ("report_to: tensorbord", "", "did you mean tensorboard?"),
        ("", LORA + "  bias: lora\n", "did you mean lora_only?"),
        ("", LORA + "  init_lora_weights: pisa\n", "did you mean pissa?"),
        ("", "on_nonfinite_loss: ignore\n", "write one of stop, warn or null"),
    ],
)
def test_enumerated_value_is_checked(tmp_path: Path, training: str, rest: str, hint: str) -> None:
    """C4: a value that is not among the choices is refused with the nearest of them."""
    (problem,) = refused(tmp_path, training, rest)
    assert hint in problem.fix


def test_numbered_choice_is_accepted(tmp_path: Path) -> None:
    """C4: PEFT's `pissa_niter_[number of iters]` stands for any number."""
    config = load(tmp_path, rest=LORA + "  init_lora_weights: pissa_niter_16\n")
    assert config.peft_config is not None
    assert config.peft_config["init_lora_weights"] == "pissa_niter_16"


def test_nested_section_of_peft_is_checked(tmp_path: Path) -> None:
    """C4: PEFT's nested configs are typed too."""
    (problem,) = refused(tmp_path, rest=LORA + "  eva_config:\n    rhoo: 2.0\n")
    assert (problem.where, problem.fix) == ("run.yaml:10: peft_config.eva_config.rhoo", "did you mean rho?")


def test_duplicate_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    """C4: a key given twice is refused."""
    assert refused(tmp_path, "seed: 1\nmax_steps: 5\nseed: 2") == (
        Problem("run.yaml:8: training_args.seed", "`seed` is given twice, in lines 6 and 8", "keep one of them"),
    )


@pytest.mark.parametrize(
    ("training", "rest", "words"),
    [
        ("per_device_train_batch_size: 0", "", "from 1 up"),
        ("gradient_accumulation_steps: 0", "", "from 1 up"),
        ("max_steps: 0", "", "-1, or a number from 1 up"),
        ("learning_rate: 0", "", "above 0"),
        ("warmup_steps: -0.1", "", "0, a whole number of steps from 1 up, or a fraction of all steps below 1"),
        ("warmup_steps: 1.5", "", "0, a whole number of steps"),
        ("eval_steps: 0", "", "a whole number of steps from 1 up, or a fraction"),
        ("save_steps: 10.5", "", "a whole number of steps from 1 up, or a fraction"),
        ("seed: -1", "", "from 0 to 4294967295"),
        ("generation_config: {max_new_tokens: 0}", "", "from 1 up"),
        ("generation_config: {num_return_sequences: 2}", "", "from 1 to 1"),
        ("", LORA + "  r: 0\n", "from 1 up"),
        ("", LORA + "  lora_dropout: 1.0\n", "from 0 to below 1"),
        ("", "peft_config: {peft_type: PREFIX_TUNING, num_virtual_tokens: 0}\n", "from 1 up"),
        ("", "max_input_length: 0\n", "from 1 up"),
        ("", "max_output_length: -5\n", "from 1 up"),
    ],
)
def test_number_out_of_range_is_refused(tmp_path: Path, training: str, rest: str, words: str) -> None:
    """C4: numbers that cannot work are refused with the range."""
    (problem,) = refused(tmp_path, training, rest)
    assert "is out of range" in problem.what
    assert words in problem.fix


@pytest.mark.parametrize("number", ["null", "1", "4"])
def test_num_proc_may_be_null(tmp_path: Path, number: str) -> None:
    """C4: null means one process."""
    config = load(tmp_path, overrides=(f"data_config.num_proc={number}",))
    assert config.data_config.num_proc == (1 if number == "null" else int(number))


# --- C5: generation_config


@pytest.mark.parametrize("training", ["", "generation_config: null", "generation_config:", "generation_config: {}"])
def test_generation_config_may_be_absent_or_null(tmp_path: Path, training: str) -> None:
    """C5: without generation_config the defaults apply."""
    config = load(tmp_path, training)
    assert config.generation_config == {}
    assert "generation_config" not in config.training_args


def test_generation_config_is_typed(tmp_path: Path) -> None:
    """C5: its keys are those of GenerationConfig, typed."""
    config = load(tmp_path, "generation_config:\n  max_new_tokens: '64'\n  do_sample: no\n  temperature: null")
    assert config.generation_config == {"max_new_tokens": 64, "do_sample": False}


def test_generation_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    """C5: a text in place of the section is refused."""
    assert refused(tmp_path, "generation_config: greedy") == (
        Problem(
            "run.yaml:6: training_args.generation_config",
            "`greedy` is not a mapping of keys",
            "write its keys below it, indented by two spaces",
        ),
    )


# --- C6: paths of JSON files


def test_deepspeed_path_starts_from_the_configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C6: the config's own folder comes before the working folder."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for folder in ("configs", "elsewhere"):
        (tmp_path / folder / "ds.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load(tmp_path / "configs", "deepspeed: ds.json")
    assert config.training_args["deepspeed"] == str((tmp_path / "configs" / "ds.json").resolve())


def test_deepspeed_path_falls_back_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C6: a file that lies in the working folder is found too."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "ds.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path / "configs", "deepspeed: ds.json")
    assert config.training_args["deepspeed"] == str((tmp_path / "ds.json").resolve())


def test_missing_deepspeed_file_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C6: a missing file is named with the places that were searched."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (problem,) = refused(tmp_path, "deepspeed: ds_zereo_2.json")
    assert problem.where == "run.yaml:6: training_args.deepspeed"
    assert problem.what == (
        f"no such file `ds_zereo_2.json`; looked for {tmp_path}/ds_zereo_2.json and {tmp_path}/work/ds_zereo_2.json"
    )
    assert problem.fix == "correct the path, or deepspeed: null"


def test_deepspeed_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    """C6: a broken JSON file shows before the model loads."""
    (tmp_path / "ds.json").write_text('{"a": 1,\n}')
    (problem,) = refused(tmp_path, "deepspeed: ds.json")
    assert problem.what.startswith("`ds.json` is not valid JSON: line 2, column 1")


def test_deepspeed_may_be_switched_off_by_option(tmp_path: Path) -> None:
    """C6: --set training_args.deepspeed=null."""
    config = load(tmp_path, "deepspeed: gone.json", overrides=("training_args.deepspeed=null",))
    assert config.training_args["deepspeed"] is None


# --- C8: the best model


BEST = "eval_strategy: steps\neval_steps: 10\nsave_steps: 20\nload_best_model_at_end: true\n"


def test_best_model_without_metric_uses_the_loss(tmp_path: Path) -> None:
    """C8: no metric named: the loss, the smaller the better."""
    arguments = load(tmp_path, BEST).training_args
    assert (arguments["metric_for_best_model"], arguments["greater_is_better"]) == ("loss", False)


@pytest.mark.parametrize("metric", ["rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact-match", "eval_rouge-l"])
def test_best_model_by_a_generated_metric(tmp_path: Path, metric: str) -> None:
    """C8: a generated metric, the greater the better, with or without the prefix, with LoRA."""
    arguments = load(tmp_path, BEST + f"metric_for_best_model: {metric}", LORA).training_args
    assert arguments["metric_for_best_model"] == metric.removeprefix("eval_")
    assert arguments["greater_is_better"] is True


def test_metric_that_does_not_exist_is_refused_with_the_list(tmp_path: Path) -> None:
    """C8: refused with the metrics that exist."""
    assert refused(tmp_path, BEST + "metric_for_best_model: rougeL") == (
        Problem(
            "run.yaml:10: training_args.metric_for_best_model",
            "there is no metric `rougeL`",
            "did you mean rouge-l? write one of loss, rouge-1, rouge-2, rouge-l, bleu-4, exact-match",
        ),
    )


def test_generated_metric_needs_generation(tmp_path: Path) -> None:
    """C8: rouge-l without predict_with_generate cannot be computed."""
    (problem,) = refused(tmp_path, BEST + "metric_for_best_model: rouge-l\npredict_with_generate: false")
    assert problem.what == "`rouge-l` compares generated replies, but predict_with_generate is false"


def test_direction_that_keeps_the_worst_is_refused(tmp_path: Path) -> None:
    """C8: greater_is_better against the metric's own direction."""
    (problem,) = refused(tmp_path, BEST + "greater_is_better: true")
    assert problem.what == "`true` would keep the worst model, since the metric is loss"


@pytest.mark.parametrize(
    ("training", "what", "fix"),
    [
        (
            "eval_strategy: steps\nsave_strategy: epoch",
            "the best model must have been saved: save_strategy is epoch, eval_strategy is steps",
            "write save_strategy: steps",
        ),
        (
            "eval_strategy: steps\neval_steps: 20\nsave_steps: 30",
            "the best model must have been saved: save_steps 30 is not a multiple of eval_steps 20",
            "write save_steps: 20",
        ),
        (
            "eval_strategy: steps\neval_steps: 0.1\nsave_steps: 30",
            "the best model must have been saved: save_steps 30 is not a multiple of eval_steps 0.1",
            "write save_steps: 0.1",
        ),
        (
            "eval_strategy: no",
            "the best model is found by evaluation, but eval_strategy is no",
            "name a val_file and write eval_strategy: steps, or write load_best_model_at_end: false",
        ),
    ],
)
def test_mismatched_saving_is_said_at_start(tmp_path: Path, training: str, what: str, fix: str) -> None:
    """C8: save and evaluation steps that do not fit."""
    (problem,) = refused(tmp_path, training + "\nload_best_model_at_end: true")
    assert (problem.what, problem.fix) == (what, fix)


@pytest.mark.parametrize(
    "training",
    [
        "eval_steps: 0.1\nsave_steps: 0.3",
        "save_steps: 20",  # evaluation then follows logging_steps, 10 by default
        "save_strategy: best",
    ],
)
def test_fitting_saving_is_accepted(tmp_path: Path, training: str) -> None:
    """C8: fractions and the default of eval_steps are compared as the library reads them."""
    config = load(tmp_path, "eval_strategy: steps\nload_best_model_at_end: true\n" + training)
    assert config.training_args["load_best_model_at_end"] is True


# --- other combinations and defaults


def test_defaults_of_the_toolkit(tmp_path: Path) -> None:
    """E6: where the file is silent nothing is reported to a service; precision is left to the machine."""
    arguments = load(tmp_path).training_args
    assert arguments == {
        "output_dir": "./output/x",
        "train_sampling_strategy": "group_by_length",
        "report_to": "none",
        "remove_unused_columns": False,
        "seed": 42,
        "logging_steps": 10,
        "predict_with_generate": True,
    }


def test_needed_columns_are_kept(tmp_path: Path) -> None:
    """C2: `remove_unused_columns: true` would drop this project's columns."""
    config = load(tmp_path, "remove_unused_columns: true")
    assert config.training_args["remove_unused_columns"] is False
    assert notices(config) == [
        "run.yaml:6: training_args.remove_unused_columns: set to false: training needs all columns of this data"
    ]


def test_prefix_tuning_switches_checkpointing_off(tmp_path: Path) -> None:
    """T1: the two cannot work together; handled at start with a notice."""
    prefix = "peft_config:\n  peft_type: PREFIX_TUNING\n  num_virtual_tokens: 16\n"
    config = load(tmp_path, "activation_checkpointing: true", prefix)
    assert config.training_args["activation_checkpointing"] is False
    assert notices(config) == [
        "run.yaml:6: training_args.activation_checkpointing: switched off: it cannot work with PREFIX_TUNING"
    ]


@pytest.mark.parametrize(
    ("training", "rest", "where", "what"),
    [
        ("bf16: true\nfp16: true", "", "run.yaml:7: training_args.fp16", "bf16 and fp16 cannot both be true"),
        (
            "dataloader_prefetch_factor: 2",
            "",
            "run.yaml:6: training_args.dataloader_prefetch_factor",
            "needs dataloader_num_workers of 1 or more",
        ),
        ("do_train: false", "", "run.yaml:6: training_args.do_train", "`false` contradicts this command, which trains"),
        (
            "do_eval: false\neval_strategy: steps",
            "",
            "run.yaml:6: training_args.do_eval",
            "`false` contradicts eval_strategy: steps",
        ),
        ("do_predict: true", "", "run.yaml:6: training_args.do_predict", "`true` needs data_config.test_file"),
        (
            "resume_from_checkpoint: x",
            "",
            "run.yaml:6: training_args.resume_from_checkpoint",
            "is not read from the config",
        ),
        ("", LORA + "  inference_mode: true\n", "run.yaml:9: peft_config.inference_mode", "nothing to train"),
        (
            "",
            LORA + "  task_type: SEQ_CLS\n",
            "run.yaml:9: peft_config.task_type",
            "`SEQ_CLS` is not what these models do",
        ),
        ("", LORA + "  target_modules: []\n", "run.yaml:9: peft_config.target_modules", "nothing to train"),
        ("", "peft_config:\n  r: 8\n", "run.yaml:7: peft_config.peft_type", "missing"),
        ("", "peft_config:\n  peft_type: LOAR\n", "run.yaml:8: peft_config.peft_type", "`LOAR` is not supported"),
        ("", "peft_config:\n  peft_type: ADALORA\n", "run.yaml:8: peft_config.peft_type", "`ADALORA` is not supported"),
        ("", "peft_config: LORA\n", "run.yaml:7: peft_config", "`LORA` is not a mapping of keys"),
        (
            "",
            "peft_config:\n  peft_type: PREFIX_TUNING\n",
            "run.yaml:7: peft_config.num_virtual_tokens",
            "missing",
        ),
    ],
)
def test_impossible_combination_is_refused(tmp_path: Path, training: str, rest: str, where: str, what: str) -> None:
    """C8: what cannot work is refused at start."""
    (problem,) = refused(tmp_path, training, rest)
    assert problem.where == where
    assert what in problem.what


def test_misspelt_peft_type_gets_a_suggestion(tmp_path: Path) -> None:
    """C1: `LOAR` is refused with the types that are supported."""
    (problem,) = refused(tmp_path, rest="peft_config:\n  peft_type: LOAR\n")
    assert problem.fix == ("did you mean LORA? write LORA or PREFIX_TUNING, or drop peft_config for full fine-tuning")


def test_key_of_the_other_peft_type_is_refused(tmp_path: Path) -> None:
    """C1: a LoRA key under PREFIX_TUNING would be ignored by nobody."""
    prefix = "peft_config:\n  peft_type: PREFIX_TUNING\n  num_virtual_tokens: 16\n  r: 8\n"
    assert refused(tmp_path, rest=prefix) == (
        Problem(
            "run.yaml:10: peft_config.r",
            "`r` is a key of LORA, not of PREFIX_TUNING",
            "leave it out, or change peft_type",
        ),
    )


@pytest.mark.parametrize("written", ["lora", "Lora", "LORA"])
def test_peft_type_in_any_case(tmp_path: Path, written: str) -> None:
    """C4: peft_type is upper case afterwards; the task is filled in."""
    config = load(tmp_path, rest=f"peft_config: {{peft_type: {written}, task_type: causal_lm}}\n")
    assert config.peft_config == {"peft_type": "LORA", "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("all-linear", "all-linear"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*\.layers\.0\..*", r".*\.layers\.0\..*"),
    ],
)
def test_target_modules_in_each_form(tmp_path: Path, written: str, read: Any) -> None:
    """C4: a list, a pattern, all-linear; bare names are a list."""
    config = load(tmp_path, rest=LORA + f"  target_modules: {written}\n")
    assert config.peft_config is not None
    assert config.peft_config["target_modules"] == read


def test_max_steps_decide_the_length(tmp_path: Path) -> None:
    """C2: both lengths given: max_steps wins, said in a notice."""
    config = load(tmp_path, "max_steps: 5\nnum_train_epochs: 2")
    assert notices(config) == [
        "run.yaml:7: training_args.num_train_epochs: max_steps: 5 decides the length of the run; "
        "num_train_epochs is not used"
    ]


def test_prediction_switched_off_leaves_the_test_file(tmp_path: Path) -> None:
    """C3: `do_predict: false` means that the test file is not predicted."""
    config = load(tmp_path, "do_predict: false", overrides=("data_config.test_file=test.jsonl",))
    assert config.data_config.test_file is None


def test_rules_wait_for_refused_keys(tmp_path: Path) -> None:
    """C8: a mistyped eval_strategy is one problem, not a chain of them."""
    found = refused(tmp_path, "eval_strategy: step\nload_best_model_at_end: true")
    assert [problem.where for problem in found] == ["run.yaml:6: training_args.eval_strategy"]


# --- --set


def test_option_overrides_and_is_typed(tmp_path: Path) -> None:
    """C4: a value from --set is typed like one from the file."""
    config = load(
        tmp_path,
        "max_steps: 5\nsave_strategy: steps",
        overrides=(
            "training_args.max_steps=20",
            "training_args.save_strategy=no",
            "training_args.learning_rate=3e-4",
            "training_args.lr_scheduler_kwargs.num_cycles=2",
            "peft_config.peft_type=lora",
            "peft_config.target_modules=[q_proj]",
            "max_input_length=64",
        ),
    )
    assert config.training_args["max_steps"] == 20
    assert config.training_args["save_strategy"] == "no"
    assert config.training_args["learning_rate"] == 3e-4
    assert config.training_args["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert config.peft_config == {"peft_type": "LORA", "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    assert config.max_input_length == 64


def test_later_option_wins(tmp_path: Path) -> None:
    """C4: the last --set of a key counts."""
    config = load(tmp_path, overrides=("training_args.seed=1", "training_args.seed=2"))
    assert config.training_args["seed"] == 2


def test_option_drops_a_section(tmp_path: Path) -> None:
    """C5: --set peft_config=null is full fine-tuning."""
    assert load(tmp_path, rest=LORA, overrides=("peft_config=null",)).peft_config is None


@pytest.mark.parametrize(
    ("override", "where", "what", "fix"),
    [
        ("training_args.max_steps", "--set training_args.max_steps", "this is not KEY=VALUE", "write KEY=VALUE"),
        ("=5", "--set =5", "this is not KEY=VALUE", "write KEY=VALUE"),
        ("a..b=5", "--set a..b=5", "this is not KEY=VALUE", "write KEY=VALUE"),
        (
            "training_args.max_stepz=5",
            "--set training_args.max_stepz",
            "unknown key `max_stepz`",
            "did you mean max_steps?",
        ),
        ("trainig_args.seed=5", "--set trainig_args.seed", "unknown key `trainig_args`", "did you mean training_args?"),
        ("training_args.seed=x", "--set training_args.seed", "`x` is not a whole number", "write a whole number"),
        ("training_args.seed=[1", "--set training_args.seed:1:3", "not valid YAML", "check"),
        (
            "training_args.output_dir.x=5",
            "--set training_args.output_dir.x",
            "`training_args.output_dir` is a single value, so nothing can be set below it",
            "write --set training_args.output_dir=VALUE",
        ),
        ("peft_config.r=4", "run.yaml: peft_config.peft_type", "missing", "write peft_type: LORA or PREFIX_TUNING"),
    ],
)
def test_bad_option_is_refused(tmp_path: Path, override: str, where: str, what: str, fix: str) -> None:
    """C1: --set is held to the same rules, and the message names the option."""
    (problem,) = refused(tmp_path, overrides=(override,))
    assert problem.where.startswith(where)
    assert problem.what.startswith(what)
    assert problem.fix.startswith(fix)


# --- data files


def data_config(**files: str | None) -> RunConfig:
    """Return a config with these data files."""
    return RunConfig(Path("run.yaml"), DataConfig(**{"train_file": "train.jsonl", **files}), 8, 8, False, {})  # type: ignore[arg-type]


def test_data_files_that_exist_are_fine(tmp_path: Path) -> None:
    """D1: every supported format, in sub-folders too."""
    (tmp_path / "more").mkdir()
    for name in ("train.jsonl", "more/dev.json", "test.parquet"):
        (tmp_path / name).touch()
    assert check_data_files(data_config(val_file="more/dev.json", test_file="test.parquet"), tmp_path) == []


def test_data_files_that_are_missing_are_all_named(tmp_path: Path) -> None:
    """D2: missing files with the nearest name, unknown formats and folders, all at once."""
    (tmp_path / "train.json").touch()
    (tmp_path / "dev.csv").touch()
    (tmp_path / "test.jsonl").mkdir()
    assert check_data_files(data_config(val_file="dev.csv", test_file="test.jsonl"), tmp_path) == [
        Problem(
            "data_config.train_file",
            f"no such file {tmp_path}/train.jsonl",
            "did you mean train.json? data files there: test.jsonl, train.json",
        ),
        Problem("data_config.val_file", "`dev.csv` has an unknown format", "use one of .jsonl, .json, .parquet"),
        Problem("data_config.test_file", f"{tmp_path}/test.jsonl is a folder", "name a file in it"),
    ]


def test_data_folder_must_be_a_folder(tmp_path: Path) -> None:
    """D2: DATA_DIR that is missing or a file."""
    (tmp_path / "train.jsonl").touch()
    (missing,) = check_data_files(data_config(), tmp_path / "gone")
    (a_file,) = check_data_files(data_config(), tmp_path / "train.jsonl")
    assert missing.what == "no such data folder"
    assert (a_file.what, a_file.fix) == ("this is a file, not a folder", f"write {tmp_path} as DATA_DIR")


# --- the whole


def test_resolved_config_is_a_config_again(tmp_path: Path) -> None:
    """C1: what goes to run.json can be run: read again, it gives the same and no notice."""
    config = load(tmp_path, "evaluation_strategy: steps\ngeneration_config: {max_new_tokens: 5}", LORA)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(json.loads(json.dumps(config.resolved()))), encoding="utf-8")
    reloaded = load_config(again)
    assert reloaded.resolved() == config.resolved()
    assert reloaded.notices == ()


def test_heavy_libraries_stay_unimported(tmp_path: Path) -> None:
    """C1: a mistake in the config shows at once, since neither torch nor transformers nor peft is imported."""
    path = write(tmp_path, "eval_strategy: steps", LORA)
    script = (
        "import sys; from pathlib import Path; from glm_edge_ft.config import load_config; "
        f"load_config(Path({str(path)!r})); "
        "print(sorted({'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


KNOWN_KEYS = [
    "data_config",
    "training_args",
    "peft_config",
    "generation_config",
    "train_file",
    "output_dir",
    "peft_type",
    "r",
    "learning_rate",
    "eval_strategy",
    "warmup_ratio",
    "group_by_length",
    "deepspeed",
    "report_to",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "target_modules",
    "eva_config",
    "combine",
    "<<",
    "debug",
]
KEYS = st.sampled_from(KNOWN_KEYS) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.sampled_from(["LORA", "PREFIX_TUNING", "steps", "no", "1e5", "{", "rouge-l", "a.json", "q_proj,v_proj", "\0"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=20
)


def load_or_refuse(path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Load a config that may be nonsense; anything but success and `UserError` fails the test."""
    try:
        config = load_config(path, overrides)
    except UserError as error:
        assert error.problems
        assert all(problem.where and problem.what for problem in error.problems)
    else:
        json.dumps(config.resolved(), allow_nan=False)


@settings(max_examples=400, deadline=None)
@given(training=st.dictionaries(KEYS, VALUES), peft=VALUES, top=st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_mapping_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, training: dict[str, Any], peft: Any, top: dict[str, Any]
) -> None:
    """C4: whatever values a config holds, the answer is a config or a plain refusal."""
    path = tmp_path_factory.getbasetemp() / "mapping.yaml"
    values = {"data_config": {"train_file": "t.jsonl"}, "training_args": training, "peft_config": peft, **top}
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    load_or_refuse(path)


@settings(max_examples=400, deadline=None)
@given(
    content=st.binary(max_size=80) | st.text(st.characters(codec="utf-8"), max_size=80).map(str.encode),
    override=st.text(max_size=20),
)
def test_any_content_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, override: str
) -> None:
    """C4: whatever bytes a config and an option hold, the answer is a plain refusal."""
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    load_or_refuse(path, (override, f"training_args.seed={override}", f"{override}=1"))
