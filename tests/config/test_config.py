"""The run configuration: mistyped names, evaluation without a file, and any content at all (cases C1, C3, C4, C5)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge_ft.config import load_config
from glm_edge_ft.errors import Problem, UserError
from tests.config.files import LORA, NO_EVALUATION, load, notices, refused, write

REPOSITORY = Path(__file__).resolve().parents[2]


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


KNOWN_KEYS = (
    *("data_config", "training_args", "peft_config", "generation_config", "train_file", "output_dir"),
    *("peft_type", "r", "learning_rate", "eval_strategy", "warmup_ratio", "group_by_length"),
    *("deepspeed", "report_to", "eval_steps", "load_best_model_at_end", "metric_for_best_model", "target_modules"),
    *("eva_config", "combine", "<<", "debug"),
)
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
