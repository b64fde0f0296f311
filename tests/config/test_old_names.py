"""Keys of older versions, and keys at the top that belong into a section (cases C2, K32)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.config import DataConfig, load_config
from glm_edge_ft.errors import Problem
from tests.config.files import HEAD, load, notices, refused


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
    ],
)
def test_old_name_keeps_its_meaning(tmp_path: Path, old: str, new: str, value: Any) -> None:
    """C2: further old names, values included, carry their meaning over with one notice."""
    config = load(tmp_path, old)
    assert config.training_args[new] == value
    assert len(config.notices) == 1


def test_old_name_of_a_setting_without_effect(tmp_path: Path) -> None:
    """C2: the old name is read, and today's has no effect: a notice for each."""
    config = load(tmp_path, "include_inputs_for_metrics: true")
    assert notices(config) == [
        'run.yaml:6: training_args.include_inputs_for_metrics: old name, read as include_for_metrics: ["inputs"]',
        "run.yaml:6: training_args.include_inputs_for_metrics: has no effect here; scores are taken from the replies",
    ]


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


FLAT = "train_file: a.json\nnum_proc: 2\ngeneration_config:\n  do_sample: no\ntraining_args:\n  output_dir: x\n"


def test_keys_at_the_top_as_the_guide_lists_them_are_read(tmp_path: Path) -> None:
    """K32: with one notice for each section; a mistake keeps its line, and `--set` wins under either name."""
    config = load(tmp_path, head=FLAT)
    assert config.data_config == DataConfig("a.json", num_proc=2)
    assert config.generation_config == {"do_sample": False}
    assert [notice.partition(" ")[0] for notice in notices(config)] == ["run.yaml:1:", "run.yaml:3:"]
    assert [
        problem.where for problem in refused(tmp_path, head=FLAT.replace("2", "many").replace("no\n", "maybe\n"))
    ] == [
        "run.yaml:2: data_config.num_proc",
        "run.yaml:4: training_args.generation_config.do_sample",
    ]
    for head in (FLAT, HEAD):
        for name in ("train_file", "data_config.train_file"):
            assert load(tmp_path, head=head, overrides=(f"{name}=b.json",)).data_config.train_file == "b.json"
    assert load_config(tmp_path / "run.yaml").resolved() == load(tmp_path).resolved()
    (twice,) = refused(tmp_path, rest="val_file: other.jsonl")
    assert twice.where.endswith(": val_file")


def test_old_name_only_the_user_can_rewrite_is_refused(tmp_path: Path) -> None:
    """C2: a retired key whose meaning moved elsewhere says where to."""
    assert refused(tmp_path, "fsdp_min_num_params: 9") == (
        Problem(
            "run.yaml:6: training_args.fsdp_min_num_params",
            "`fsdp_min_num_params` is not a key of this toolkit",
            "leave it out; use deepspeed to share a model between GPUs",
        ),
    )


def test_hub_token_is_printed_nowhere(tmp_path: Path) -> None:
    """C2: a secret stands neither in a notice nor in what run.json holds."""
    config = load(tmp_path, "push_to_hub_token: hf_secret")
    assert config.training_args["hub_token"] == "hf_secret"
    assert "hf_secret" not in json.dumps(config.resolved()) + "".join(config.notices)
