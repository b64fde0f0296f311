"""Combinations, defaults of the toolkit and the best model (case C8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.errors import Problem
from tests.config.files import LORA, load, notices, refused

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


PREFIX = "peft_config:\n  peft_type: PREFIX_TUNING\n"


@pytest.mark.parametrize(
    ("training", "rest", "where", "what"),
    [
        ("bf16: true\nfp16: true", "", "7: training_args.fp16", "bf16 and fp16 cannot both be true"),
        ("dataloader_prefetch_factor: 2", "", "6: training_args.dataloader_prefetch_factor", "dataloader_num_workers"),
        ("do_train: false", "", "6: training_args.do_train", "`false` contradicts this command, which trains"),
        ("do_eval: false\neval_strategy: steps", "", "6: training_args.do_eval", "contradicts eval_strategy: steps"),
        ("do_predict: true", "", "6: training_args.do_predict", "`true` needs data_config.test_file"),
        ("resume_from_checkpoint: x", "", "6: training_args.resume_from_checkpoint", "is not read from the config"),
        ("", LORA + "  inference_mode: true\n", "9: peft_config.inference_mode", "nothing to train"),
        ("", LORA + "  task_type: SEQ_CLS\n", "9: peft_config.task_type", "`SEQ_CLS` is not what these models do"),
        ("", LORA + "  target_modules: []\n", "9: peft_config.target_modules", "nothing to train"),
        ("", "peft_config:\n  r: 8\n", "7: peft_config.peft_type", "missing"),
        ("", "peft_config:\n  peft_type: LOAR\n", "8: peft_config.peft_type", "`LOAR` is not supported"),
        ("", "peft_config:\n  peft_type: ADALORA\n", "8: peft_config.peft_type", "`ADALORA` is not supported"),
        ("", "peft_config: LORA\n", "7: peft_config", "`LORA` is not a mapping of keys"),
        ("", PREFIX, "7: peft_config.num_virtual_tokens", "missing"),
        ("", f"{PREFIX}  num_virtual_tokens: 16\n  r: 8\n", "10: peft_config.r", "`r` is not a key of PREFIX_TUNING"),
    ],
)
def test_impossible_combination_is_refused(tmp_path: Path, training: str, rest: str, where: str, what: str) -> None:
    """C1, C8: what cannot work is refused at start."""
    (problem,) = refused(tmp_path, training, rest)
    assert problem.where == f"run.yaml:{where}"
    assert what in problem.what
    assert problem.fix


def test_misspelt_peft_type_gets_a_suggestion(tmp_path: Path) -> None:
    """C1: `LOAR` is refused with the types that are supported."""
    (problem,) = refused(tmp_path, rest="peft_config:\n  peft_type: LOAR\n")
    assert problem.fix.startswith("did you mean LORA? write peft_type: LORA or PREFIX_TUNING")


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


# --- rows without padding
def test_padding_stays_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    """The value is in the record of the run."""
    assert load(tmp_path).padding_free is False
    config = load(tmp_path, rest="padding_free: true\n" + LORA)
    assert config.padding_free is config.resolved()["padding_free"] is True


@pytest.mark.parametrize(
    ("training", "rest", "where", "what"),
    [
        ("", f"{PREFIX}  num_virtual_tokens: 4\n", "7: padding_free", "cannot work with PREFIX_TUNING"),
        ("neftune_noise_alpha: 5", "", "6: training_args.neftune_noise_alpha", "its noise is scaled by the length"),
        ("torch_compile: true", "", "6: training_args.torch_compile", "each would be compiled anew"),
    ],
)
def test_what_cannot_be_without_padding_is_refused(
    tmp_path: Path, training: str, rest: str, where: str, what: str
) -> None:
    """And is accepted where padding_free is false."""
    (problem,) = refused(tmp_path, training, "padding_free: true\n" + rest)
    assert problem.where == f"run.yaml:{where}"
    assert what in problem.what
    assert problem.fix.startswith("write padding_free: false")
    load(tmp_path, training, "padding_free: false\n" + rest)
