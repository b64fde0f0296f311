"""Images before training: every bad one is named by the rows that use it, or its rows are left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from glm_edge_ft.data.dataset import load_prompts
from glm_edge_ft.data.image_check import ImageCheck
from glm_edge_ft.errors import UserError
from tests.data.vision import IMAGE, REPLY, built, image, names, user, vision_encoder

WriteRows = Callable[..., Path]


def test_all_bad_images_are_listed_before_training(backend: Tokenizer, path: Path, tmp_path: Path) -> None:
    """I3: over all splits, each row that uses one."""
    (tmp_path / "red.png").unlink()
    (tmp_path / "图 片/blue b.png").write_bytes(b"")
    dataset = built(backend, path)
    with pytest.raises(UserError) as caught:
        ImageCheck(progress=False).of_datasets({"train": dataset})
    assert [str(problem).split("\n")[0] for problem in caught.value.problems] == [
        f"train.jsonl:1: image {tmp_path}/red.png: there is no such file",
        f"train.jsonl:3: image {tmp_path}/图 片/blue b.png: the file is empty (0 bytes)",
    ]


def test_rows_with_bad_images_can_be_left_out(backend: Tokenizer, path: Path, tmp_path: Path) -> None:
    """I3: `on_bad_image: skip` drops and counts them; the others keep their images."""
    (tmp_path / "red.png").write_text("<html>", encoding="utf-8")
    checked, notices = ImageCheck("skip", progress=False).of_datasets({"train": built(backend, path)})
    dataset = checked["train"]
    assert notices == ["train: 1 rows with bad images are left out (on_bad_image: skip)"]
    assert [(dataset.row(index)["line"], len(dataset[index]["images"])) for index in range(2)] == [(2, 0), (3, 1)]
    assert names(dataset[1]["images"], tmp_path) == ["图 片/blue b.png"]
    assert dataset.lengths.tolist() == [len(dataset[index]["input_ids"]) for index in range(2)]
    assert (dataset.report.rows, dataset.report.dropped_rows) == (2, 1)
    assert dataset.report.dropped[0].startswith(f"train.jsonl:1: image {tmp_path}/red.png: this is a text (HTML")


def test_a_split_of_bad_images_alone_is_refused(backend: Tokenizer, write_rows: WriteRows) -> None:
    """I3: nothing would be left to train on."""
    dataset = built(backend, write_rows([[user(IMAGE), REPLY]] * 2))
    with pytest.raises(
        UserError, match=r"train: all 2 rows have bad images: none is left\n    -> first of them: train"
    ):
        ImageCheck("skip", progress=False).of_datasets({"train": dataset})


def test_evaluation_samples_with_bad_images(backend: Tokenizer, path: Path, tmp_path: Path) -> None:
    """I3: refused by place, or left out and counted; the image that was opened for the data set is not opened again."""
    samples = load_prompts([path], vision_encoder(backend))
    check = ImageCheck("skip", progress=False)
    check.of_datasets({"train": built(backend, path)})
    (tmp_path / "red.png").unlink()
    assert check.of_prompts(samples) == (samples, [])
    kept, notices = ImageCheck("skip", progress=False).of_prompts(samples)
    assert [sample.line for sample in kept] == [2, 3, 3]
    assert notices == ["1 evaluation samples with bad images are left out (on_bad_image: skip)"]
    with pytest.raises(UserError, match=r"train.jsonl:1: image .*red.png: there is no such file"):
        ImageCheck(progress=False).of_prompts(samples)


def test_twenty_bad_rows_are_listed_and_the_others_counted(backend: Tokenizer, write_rows: WriteRows) -> None:
    """I3: a data set whose folder is missing gives no thousand lines."""
    dataset = built(backend, write_rows([[user(image(f"/none/{number}.png")), REPLY] for number in range(33)]))
    with pytest.raises(UserError) as caught:
        ImageCheck(progress=False).of_datasets({"train": dataset})
    assert len(caught.value.problems) == 21
    assert str(caught.value.problems[-1]) == "rows with bad images: ... and 13 more"
