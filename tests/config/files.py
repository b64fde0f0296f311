"""Config files for the tests: a small valid one with more lines put in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent, indent

import pytest

from glm_edge_ft.config import ConfigError, DataConfig, RunConfig, load_config
from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.files import expand_home

HEAD = "data_config:\n  train_file: train.jsonl\n  val_file: dev.jsonl\ntraining_args:\n  output_dir: ./output/x\n"
NO_EVALUATION = "data_config:\n  train_file: train.jsonl\n  val_file: null\ntraining_args:\n  output_dir: ./output/x\n"
LORA = "peft_config:\n  peft_type: LORA\n"


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


def readable(path: Path, overrides: Sequence[str] = ()) -> tuple[DataConfig | None, Path | None]:
    """Return the data files and the output folder of a config, also where it has errors."""
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return error.data_config, error.output_dir
    except UserError:
        return None, None
    return config.data_config, expand_home(config.training_args["output_dir"])
