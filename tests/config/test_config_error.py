"""What can be read of a config with errors: the files that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_edge_ft.config import DataConfig, check_data_files
from glm_edge_ft.errors import Problem
from tests.config.files import HEAD, readable, refused, write

DATA = DataConfig("train.jsonl", "dev.jsonl")
OUTPUT = Path("output/x")


@pytest.mark.parametrize(
    ("training", "rest"),
    [
        ("learning_rate: fast\nsave_step: 3", ""),
        ("fsdp: full_shard", "peft_config: {peft_type: LOAR}\n"),
        ("", "max_input_length: 0\nunknown: 1\n"),
    ],
)
def test_files_are_read_beside_mistakes(tmp_path: Path, training: str, rest: str) -> None:
    """C1: mistakes elsewhere do not hide the data files and the output folder."""
    assert refused(tmp_path, training, rest) != ()
    assert readable(write(tmp_path, training, rest)) == (DATA, OUTPUT)


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("train_file: train.jsonl", "train_fil: train.jsonl", (None, OUTPUT)),
        ("train_file: train.jsonl", "train_file: [a]", (None, OUTPUT)),
        ("val_file: dev.jsonl", "val_file: {a: b}", (DataConfig("train.jsonl"), OUTPUT)),
        ("output_dir: ./output/x", "output_dir: run.yaml/", (DATA, Path("run.yaml"))),
        ("output_dir: ./output/x", "output_dir: [a]", (DATA, None)),
        ("output_dir: ./output/x", "seed: -1", (DATA, None)),
    ],
)
def test_what_cannot_be_read_is_none(
    tmp_path: Path, written: str, instead: str, expected: tuple[DataConfig | None, Path | None]
) -> None:
    """C1: each part stands by itself."""
    assert readable(write(tmp_path, head=HEAD.replace(written, instead))) == expected


@pytest.mark.parametrize("content", [b"", b"- a\n", b"a: [", b"\xff", b"\0"])
def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path, content: bytes) -> None:
    """C1: nothing is raised for a file that is no config, or for none."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert readable(path) == (None, None)
    assert readable(tmp_path / "absent.yaml") == (None, None)


def test_overrides_count(tmp_path: Path) -> None:
    """C1: `--set` is laid over the file, a wrong option beside it."""
    options = ["data_config.val_file=other.jsonl", "training_args.output_dir=~/y", "nonsense"]
    assert readable(write(tmp_path), options) == (DataConfig("train.jsonl", "other.jsonl"), Path.home() / "y")


def test_data_files_of_a_peeked_config_are_checked(tmp_path: Path) -> None:
    """D2: a missing file is found although the config has a mistake."""
    (tmp_path / "train.jsonl").write_text("", encoding="utf-8")
    data, _ = readable(write(tmp_path, "save_step: 3"))
    assert check_data_files(data, tmp_path) == [
        Problem(
            "data_config.val_file",
            f"no such file {tmp_path}/dev.jsonl",
            "did you mean train.jsonl? data files there: train.jsonl",
        )
    ]


def test_without_data_files_the_folder_is_checked(tmp_path: Path) -> None:
    """D2: DATA_DIR is looked at even where no file name could be read."""
    absent = tmp_path / "absent"
    assert check_data_files(None, tmp_path) == []
    assert check_data_files(None, absent) == [
        Problem(str(absent), "no such data folder", "DATA_DIR is the folder that holds data_config.train_file")
    ]
