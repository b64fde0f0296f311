"""The run configuration: old and mistyped names, files, `--set` (cases C1, C2, C3, C5, C6)."""

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

from glm_edge_ft.config import DataConfig, RunConfig, check_data_files, load_config, peek
from glm_edge_ft.errors import Problem, UserError
from tests.config.files import HEAD, LORA, NO_EVALUATION, load, notices, refused, write

REPOSITORY = Path(__file__).resolve().parents[2]


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
        Problem("data_config.test_file", f"{tmp_path}/test.jsonl is a folder", "name a file"),
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
        data, output_dir = peek(path, overrides)
        assert data is None or isinstance(data, DataConfig)
        assert output_dir is None or output_dir == output_dir.expanduser()
    else:
        json.dumps(config.resolved(), allow_nan=False)
        assert peek(path, overrides) == (
            config.data_config,
            Path(config.training_args["output_dir"]).expanduser(),
        )


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
