"""What a run builds of its settings is tried with the run's own numbers before the weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from glm_edge_ft.errors import Problem, UserError
from tests.launch import start
from tests.runs import conversation, do_run

EVALUATED: dict[str, Any] = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 2}


def check(folder: Path, **settings: Any) -> tuple[Problem, ...]:
    """Check a run of six steps on 18 rows and return what is refused."""
    try:
        do_run(folder / "output", folder / "data", folder / "model", check=True, **settings)
    except UserError as error:
        assert all(problem.fix for problem in error.problems)
        return error.problems
    return ()


def where(problems: tuple[Problem, ...]) -> list[str]:
    """Return the keys, without the file."""
    return [problem.where.rpartition(" ")[2].removeprefix("training_args.") for problem in problems]


def test_everything_that_would_fail_later_is_listed_at_once(chat_folder: Path) -> None:
    """K14, K15, K16, K17: by the script itself, with exit code 2, each with its key and once."""
    settings = {
        "per_device_train_batch_size": 32,
        "dataloader_drop_last": True,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 0.5},
        "push_to_hub": True,
        "report_to": ["wandb"],
        "optim_args": "momentum=0.9",
        "generation_config": {"max_new_tokens": 8, "bad_words_ids": [[999_999]]},
        **EVALUATED,
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_none"}
    output = chat_folder / "output"
    said = start(output, chat_folder / "data", chat_folder / "model", environment=offline, **settings).end(code=2)
    assert "Traceback" not in said
    for key in (
        *("dataloader_drop_last", "lr_scheduler_kwargs", "push_to_hub", "report_to", "optim_args"),
        "generation_config.bad_words_ids",
    ):
        assert said.count(f"training_args.{key}: ") == 1, key
    assert not output.exists()


@pytest.mark.parametrize("written", [{"num_train_epochs": 0}, {"max_steps": 0}, {"num_train_epochs": -1}])
def test_a_length_of_nothing_is_refused(chat_folder: Path, written: dict[str, Any]) -> None:
    """K14: a run that would take no step is none."""
    settings = {"max_steps": -1, **written}
    assert where(check(chat_folder, **settings)) == [next(iter(written))]


def test_whole_batches_are_enough(chat_folder: Path) -> None:
    """K14: 18 rows are two batches of 8; the smallest share of an epoch is one step."""
    settings: dict[str, Any] = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    assert check(chat_folder, **settings, num_train_epochs=1e-6, max_steps=-1) == ()


@pytest.mark.parametrize(
    ("name", "specific", "key"),
    [
        ("polynomial", {"lr_end": 0.5}, "lr_scheduler_type"),
        ("polynomial", {"power": -1.5}, "lr_scheduler_kwargs"),
        ("cosine_with_min_lr", {"min_lr": 0.5}, "lr_scheduler_kwargs"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "lr_scheduler_kwargs"),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-3, "warmup_lr_rate": 3.0}, "lr_scheduler_kwargs"),
        ("cosine_with_min_lr", None, "lr_scheduler_type"),
        ("warmup_stable_decay", None, "lr_scheduler_type"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "lr_scheduler_type"),
        ("linear", {"lr_end": 0}, "lr_scheduler_type"),
        ("cosine", {"num_cycles": "many"}, "lr_scheduler_type"),
        ("reduce_lr_on_plateau", {"factor": 2}, "lr_scheduler_type"),
    ],
)
def test_a_schedule_that_cannot_be_or_leaves_its_rates_is_refused(
    chat_folder: Path, name: str, specific: dict[str, Any] | None, key: str
) -> None:
    """K15: built with the run's own rate, which is 0.01, and its six steps."""
    settings = {"lr_scheduler_type": name, "lr_scheduler_kwargs": specific, "warmup_steps": 2, **EVALUATED}
    assert where(check(chat_folder, **settings)) == [key]


@pytest.mark.parametrize(
    ("name", "specific"),
    [
        ("polynomial", {"lr_end": 1e-3, "power": 2.0}),
        ("cosine_with_min_lr", {"min_lr": 1e-3}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear"}),
        ("cosine", {"num_cycles": 0.5}),
        ("inverse_sqrt", {"timescale": 10}),
        ("reduce_lr_on_plateau", {"factor": 0.5}),
        ("constant", None),
    ],
)
def test_a_schedule_that_can_be_built_is_taken(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], name: str, specific: dict[str, Any] | None
) -> None:
    """K15: texts among its arguments too, and without a word."""
    assert check(chat_folder, lr_scheduler_type=name, lr_scheduler_kwargs=specific, **EVALUATED) == ()
    assert "training_args" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 100}, "comes to a rate of 0.0005 at most; warmup_steps is 100"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 99}},
            "comes to a rate of",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "warmup_steps has no effect"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs has no effect"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1 has no effect"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules has no effect"),
    ],
)
def test_what_changes_nothing_or_never_reaches_the_rate_is_said(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], said: str
) -> None:
    """K13, K15: in the check already."""
    assert check(chat_folder, **settings) == ()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optimizer", "arguments", "key"),
    [
        ("sgd", "momentum=0.9,nesterov=true", None),
        ("sgd", "momentum=0.0", None),
        ("sgd", "momentum=0.9,impetus=1", "optim_args"),
        ("sgd", "momentum", "optim"),
        ("sgd", "momentum=much", "optim"),
        ("adamw_torch", "betas=1", "optim_args"),
        ("rmsprop", "alpha=0.9,centered=true", None),
    ],
)
def test_arguments_of_an_optimizer_are_those_that_it_reads(
    chat_folder: Path, optimizer: str, arguments: str, key: str | None
) -> None:
    """K13: a name that it does not know, or a value of another kind, is refused; all others are taken."""
    assert where(check(chat_folder, optim=optimizer, optim_args=arguments)) == ([key] if key else [])


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("activation_checkpointing_kwargs", {"use_reentrant": False}, None),
        ("activation_checkpointing_kwargs", {"reentrant": False}, "activation_checkpointing_kwargs"),
        ("activation_checkpointing_kwargs", {"use_reentrant": "maybe"}, "activation_checkpointing_kwargs"),
        ("accelerator_config", {"split_batches": True}, None),
        ("accelerator_config", {"split_batch": True}, "accelerator_config.split_batch"),
        ("accelerator_config", {"split_batches": "maybe"}, "accelerator_config.split_batches"),
        ("lr_scheduler_kwargs", "fast", "lr_scheduler_kwargs"),
        ("activation_checkpointing_kwargs", 3, "activation_checkpointing_kwargs"),
    ],
)
def test_settings_inside_a_key_are_checked_too(chat_folder: Path, key: str, value: Any, place: str | None) -> None:
    """K13: unknown names and values of another kind are refused, each with what to write."""
    settings = {"activation_checkpointing": True, key: value}
    assert where(check(chat_folder, **settings)) == ([place] if place else [])


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("bad_words_ids", [[5], [6, 7]], True),
        ("bad_words_ids", [], False),
        ("bad_words_ids", [[5, 999_999]], False),
        ("suppress_tokens", [5], True),
        ("suppress_tokens", [999_999], False),
        ("begin_suppress_tokens", [-1], False),
        ("forced_eos_token_id", 999_999, False),
        ("sequence_bias", [[[5, 6], 1.5]], True),
        ("sequence_bias", [[[5, 999_999], 1.5]], False),
        ("exponential_decay_length_penalty", [4, 1.5], True),
        ("exponential_decay_length_penalty", [4], False),
        ("top_h", 7, False),
    ],
)
def test_generation_is_tried_with_the_models_own_ids(chat_folder: Path, key: str, value: Any, fits: bool) -> None:
    """K16: ids of the vocabulary, and forms that `generate` takes; else the key is named."""
    generation = {"max_new_tokens": 8, "do_sample": key == "top_h", key: value}
    found = where(check(chat_folder, generation_config=generation, **EVALUATED))
    assert found == ([] if fits else [f"generation_config.{key}"])


@pytest.mark.parametrize("used", [True, False])
def test_ids_that_the_model_lacks_count_where_they_occur(chat_folder: Path, used: bool) -> None:
    """K16: a tokenizer larger than the vocabulary is refused with the row that needs it, and else left alone."""
    tokenizer = AutoTokenizer.from_pretrained(chat_folder / "model")
    tokenizer.add_tokens(["zzzz"])
    tokenizer.save_pretrained(chat_folder / "model")
    row = conversation(1)
    row["messages"][1]["content"] += " zzzz" if used else " zzz"
    with (chat_folder / "data" / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    problems = check(chat_folder)
    assert [problem.where for problem in problems] == (["train.jsonl:19"] if used else [])
    assert all(f"token {len(tokenizer) - 1} (`zzzz`)" in problem.what for problem in problems)


def test_a_config_without_pad_token_is_refused_where_the_class_has_one_beyond_it(chat_folder: Path) -> None:
    """K16: GLM's own default is larger than the vocabulary."""
    path = chat_folder / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["pad_token_id"]
    path.write_text(json.dumps(config), encoding="utf-8")
    (problem,) = check(chat_folder)
    assert problem.where.startswith("MODEL ")
    assert problem.fix.startswith('write "pad_token_id": ')
