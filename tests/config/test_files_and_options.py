"""Files that a config names, and `--set` (cases C5, C6, D2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_edge_ft.config import DataConfig, RunConfig, check_data_files
from glm_edge_ft.errors import Problem
from tests.config.files import LORA, load, refused


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
        ("trainig_args.seed=5", "--set trainig_args", "unknown key `trainig_args`", "did you mean training_args?"),
        ("training_args.seed=x", "--set training_args.seed", "`x` is not a whole number", "write a whole number"),
        ("training_args.seed=[1", "--set training_args.seed:1:3", "not valid YAML", "check"),
        (
            "training_args.output_dir.x=5",
            "--set training_args.output_dir.x",
            "`training_args.output_dir` is a single value, so nothing can be set below it",
            "write --set training_args.output_dir=VALUE",
        ),
        ("peft_config.r=4", "--set peft_config.peft_type", "missing", "write peft_type: LORA or PREFIX_TUNING"),
    ],
)
def test_bad_option_is_refused(tmp_path: Path, override: str, where: str, what: str, fix: str) -> None:
    """C1: --set is held to the same rules, and the message names the option."""
    (problem,) = refused(tmp_path, overrides=(override,))
    assert problem.where.startswith(where)
    assert problem.what.startswith(what)
    assert problem.fix.startswith(fix)


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
