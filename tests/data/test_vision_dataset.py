"""Vision data from files to batches: paths, cache, checks before training, pixels in the order of placeholders."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from glm_edge_ft.data import cache
from glm_edge_ft.data.collator import PaddedCollator, VisionCollator
from glm_edge_ft.data.dataset import build_dataset, load_prompts
from glm_edge_ft.data.image_check import ImageCheck
from glm_edge_ft.data.images import load_image, preprocess
from glm_edge_ft.data.pixels import pixel_normalizer
from glm_edge_ft.data.prompts import encode_prompts
from glm_edge_ft.data.report import format_report, preview
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import RunStopped, UserError
from tests.conftest import EncoderMaker
from tests.data.vision import (
    IMAGE,
    REPLY,
    built,
    image,
    image_processor_of,
    names,
    released_template,
    text,
    user,
    vision_encoder,
    vision_tokenizer,
    write_images,
)

WriteRows = Callable[..., Path]
PAD = 0


def test_images_are_found_from_any_folder(
    backend: Tokenizer, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I3: relative to the data file, though the run starts elsewhere and gives the file a relative path."""
    monkeypatch.chdir(tmp_path)
    dataset = built(backend, Path("train.jsonl"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [names(dataset[index]["images"], tmp_path) for index in range(3)] == [
        ["red.png"],
        [],
        ["图 片/blue b.png"],
    ]
    assert dataset[-1]["images"] == dataset[2]["images"]
    assert all(Path(where).is_file() for index in range(3) for where in dataset[index]["images"])


def test_chat_data_has_no_images(make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path) -> None:
    """D4: samples of chat data are as they were, and no file of images lies in their cache."""
    file = write_rows([[{"role": "user", "content": "hello"}, REPLY]])
    dataset, _ = build_dataset([file], make_encoder("glm"), 1, tmp_path / "cache", progress=False)
    assert set(dataset[0]) == {"input_ids", "labels"}
    assert not (dataset.folder / cache.IMAGE_PATHS_FILE).exists()
    checked, notices = ImageCheck(progress=False).of_datasets({"train": dataset})
    assert (checked["train"] is dataset, notices) == (True, [])


def test_chat_data_for_a_vision_checkpoint_has_no_images(backend: Tokenizer, write_rows: WriteRows) -> None:
    """D4: its language part is trained as a chat model is."""
    dataset = built(backend, write_rows([[{"role": "user", "content": "hello"}, REPLY]]), max_images=0)
    assert (set(dataset[0]), dataset.has_images) == ({"input_ids", "labels"}, False)


def test_a_pickled_data_set_finds_its_images(backend: Tokenizer, path: Path) -> None:
    """I1: a loader's worker opens the files for itself."""
    dataset = built(backend, path).without({1: "no reason"})
    again = pickle.loads(pickle.dumps(dataset))
    assert [again[index]["images"] for index in range(2)] == [dataset[index]["images"] for index in range(2)]
    assert [again.row(index)["line"] for index in range(2)] == [1, 3]


def test_worker_processes_store_the_same_paths(
    backend: Tokenizer, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: `num_proc` changes the time, not the result; rows of no, one and two images."""
    parts = [[text("hello")], [image("a.png")], [image("图.png"), text("there"), image("b.png")]]
    file = write_rows([[user(*parts[number % 3]), REPLY] for number in range(700)])
    alone = built(backend, file, max_images=2)
    monkeypatch.setattr("glm_edge_ft.data.workers.BYTES_PER_PROCESS", 1)
    together = built(backend, file, max_images=2, num_proc=2, cache_name="other")
    for name in (cache.IMAGE_PATHS_FILE, cache.IMAGE_ENDS_FILE, cache.ROWS_FILE, cache.IDS_FILE):
        assert (alone.folder / name).read_bytes() == (together.folder / name).read_bytes()
    expected = [[], ["a.png"], ["图.png", "b.png"]]
    assert [names(alone[i]["images"], file.parent) for i in range(700)] == [expected[i % 3] for i in range(700)]


def test_three_thousand_rows_of_one_image_are_small(backend: Tokenizer, write_rows: WriteRows) -> None:
    """I1: less than 4 KB a row with 578 placeholders, and no pixel: the image does not even exist."""
    file = write_rows([[user(image("pictures/one.jpg"), text(f"hello {number}")), REPLY] for number in range(3000)])
    dataset = built(backend, file, count=578)
    size = {child.name: child.stat().st_size for child in dataset.folder.iterdir()}
    assert sum(size.values()) < 3000 * 4096
    assert size[cache.IMAGE_PATHS_FILE] == 3000 * len("pictures/one.jpg")
    assert size[cache.IMAGE_ENDS_FILE] == 3000 * 8


MEASURE = """
import pickle, sys
from pathlib import Path
dataset, collator = pickle.loads(Path(sys.argv[1]).read_bytes())
rows = [len(collator([dataset[row] for row in range(at, at + 6)])["pixel_values"]) for at in range(0, len(dataset), 6)]
status = Path("/proc/self/status").read_text()
print(sum(rows), status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_rows_of_one_image(
    backend: Tokenizer, write_rows: WriteRows, tmp_path: Path
) -> None:
    """I1: an epoch over 3,000 rows, whose pixels are 113 MB, takes less than 10 MB more than one over 300."""
    write_images(tmp_path)
    collator = VisionCollator(PaddedCollator(PAD), image_processor_of(tmp_path, size={"height": 56, "width": 56}))
    peaks = []
    for count in (300, 3000):
        file = write_rows([[user(image("red.png"), text(f"hello {number}")), REPLY] for number in range(count)])
        (tmp_path / "pickled").write_bytes(pickle.dumps((built(backend, file), collator)))
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "pickled")]
        rows, kilobytes = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert rows == count
        peaks.append(kilobytes)
    assert peaks[1] - peaks[0] < 10_000


def test_the_cache_knows_the_settings_of_images(
    backend: Tokenizer, write_rows: WriteRows, tmp_path: Path, make_encoder: EncoderMaker
) -> None:
    """D5: other settings, and the same file in another folder, are encoded anew."""
    file = write_rows([[{"role": "user", "content": "hello"}, REPLY]])
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    store = tmp_path / "cache"
    encoders = [vision_encoder(backend), vision_encoder(backend, max_images=2), vision_encoder(backend, count=4)]
    datasets = [build_dataset([file], encoder, 1, store, progress=False)[0] for encoder in encoders]
    datasets.append(build_dataset([other], encoders[0], 1, store, progress=False)[0])
    datasets.append(build_dataset([file], make_encoder("glm"), 1, store, progress=False)[0])
    assert len({dataset.folder for dataset in datasets}) == 5
    again, notices = build_dataset([file], vision_encoder(backend), 1, store, progress=False)
    assert again.folder == datasets[0].folder
    assert notices[0].startswith("train.jsonl: encoded data taken from ")


def test_bad_rows_of_images_are_listed_with_all_others(backend: Tokenizer, write_rows: WriteRows) -> None:
    """I4: what the model cannot take is refused by place, all of it at once."""
    file = write_rows(
        [
            [user(image(""), text("hello")), REPLY],
            [user(IMAGE, IMAGE), REPLY],
            [user(text("<|begin_of_image|>")), REPLY],
            [user(text("hello")), {"role": "assistant", "content": [IMAGE]}],
        ]
    )
    with pytest.raises(UserError) as caught:
        built(backend, file)
    assert [problem.where for problem in caught.value.problems] == [
        "train.jsonl:1: messages[0].content[0]",
        "train.jsonl:2",
        "train.jsonl:3: messages[0]",
        "train.jsonl:4: messages[1].content[0]",
    ]


def test_the_report_counts_image_tokens_apart(backend: Tokenizer, path: Path) -> None:
    """I5: placeholders are neither text nor template; a system turn that is left out is told of."""
    report = built(backend, path).report
    assert report.role_tokens == {"system": 0, "user": 5, "assistant": 8, "other": 0, "template": 19, "image": 6}
    assert report.tokens == sum(report.role_tokens.values())
    assert ["image", "6", "15.8", "%"] in [line.split() for line in format_report(report).splitlines()]


def test_a_system_turn_that_the_template_drops_is_told_of(backend: Tokenizer, write_rows: WriteRows) -> None:
    """I2: the row trains without it, with a notice."""
    file = write_rows([[{"role": "system", "content": "hello"}, user(IMAGE), REPLY]])
    assert built(backend, file).report.notices == ("the model's chat template leaves system messages out (1 row)",)


def test_a_preview_shows_a_run_of_placeholders_once(backend: Tokenizer, path: Path) -> None:
    """I5: 578 equal tokens fill no screen."""
    dataset = built(backend, path, count=578)
    shown = preview([dataset.row(0)], vision_tokenizer(backend, released_template()), color=False)
    assert shown == (
        "train.jsonl:1  586 tokens, 3 supervised\n"
        "<|user|>|\\n|<|begin_of_image|> x 578|hello|<|assistant|>|\\n|«my»|« friend»|«<|user|>»"
    )


def test_pixels_stand_in_the_order_of_their_placeholders(
    backend: Tokenizer, write_rows: WriteRows, tmp_path: Path
) -> None:
    """I2, I4: two images, none, one: three pictures, and the text row takes none of them."""
    write_images(tmp_path)
    red, blue = image("red.png"), image("图 片/blue b.png")
    rows = [[user(blue, red), REPLY], [user(text("hello")), REPLY], [user(red), REPLY]]
    dataset = built(backend, write_rows(rows), max_images=2)
    processor = image_processor_of(tmp_path)
    batch = VisionCollator(PaddedCollator(PAD), processor)([dataset[index] for index in range(3)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((3, 3, 672, 672), torch.float32)
    assert batch["pixel_values"].mean(dim=(2, 3)).tolist() == [[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0], [1.0, -1.0, -1.0]]
    expected = preprocess(load_image(tmp_path / "red.png"), processor)
    assert np.array_equal(batch["pixel_values"][2].numpy(), expected)
    assert torch.equal(batch["input_ids"], PaddedCollator(PAD)([dataset[index] for index in range(3)])["input_ids"])


def test_a_batch_of_text_has_no_pixels(backend: Tokenizer, path: Path, tmp_path: Path) -> None:
    """I2: the model then runs as a language model."""
    dataset = built(backend, path)
    batch = VisionCollator(PaddedCollator(PAD), image_processor_of(tmp_path))([dataset[1], dataset[1]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_pixels_are_decoded_in_the_loaders_workers(backend: Tokenizer, path: Path, tmp_path: Path) -> None:
    """I1: data set and collator cross to a worker process."""
    collator = VisionCollator(PaddedCollator(PAD), image_processor_of(tmp_path))
    loader: Any = DataLoader(built(backend, path), batch_size=2, num_workers=1, collate_fn=collator)  # type: ignore[arg-type]
    assert [batch["pixel_values"].mean(dim=(2, 3)).tolist() for batch in loader] == [
        [[1.0, -1.0, -1.0]],
        [[-1.0, -1.0, 1.0]],
    ]


@pytest.mark.parametrize("processes", [0, 2])
def test_bytes_from_the_loader_are_scaled_to_the_pixels_of_the_processor(
    backend: Tokenizer, path: Path, tmp_path: Path, processes: int
) -> None:
    """I3: in this process and from others, memory that both share, several images in a batch."""
    processor = image_processor_of(tmp_path)
    dataset, scale = built(backend, path), pixel_normalizer(processor, torch.device("cpu"))
    assert scale is not None
    order = [[0, 2], [1], [2, 0, 2]]
    ways = [VisionCollator(PaddedCollator(PAD), processor, emit_uint8=emit_uint8) for emit_uint8 in (False, True)]
    loaders: list[Any] = [
        DataLoader(dataset, batch_sampler=order, num_workers=processes, collate_fn=way)  # type: ignore[arg-type]
        for way in ways
    ]
    plain, handed = (list(loader) for loader in loaders)
    assert [batch["pixel_values"].dtype for batch in handed if "pixel_values" in batch][:1] == [torch.uint8]
    for expected, batch in zip(plain, handed, strict=True):
        completed = scale.add_image_features(batch)
        assert completed.keys() == expected.keys()
        assert all(torch.equal(completed[name], values) for name, values in expected.items())


def test_an_image_that_vanishes_during_training_stops_the_run(backend: Tokenizer, path: Path, tmp_path: Path) -> None:
    """I3: with its path; the message outlives the way that a loader's worker passes on exceptions."""
    collator = VisionCollator(PaddedCollator(PAD), image_processor_of(tmp_path))
    dataset = built(backend, path)
    (tmp_path / "red.png").unlink()
    with pytest.raises(RunStopped, match=r"cannot be read now: .*red.png: there is no such file"):
        collator([dataset[0]])
    try:
        collator([dataset[0]])
    except RunStopped:
        passed_on = ExceptionWrapper(where="in a worker")
    with pytest.raises(RunStopped, match=r"cannot be read now: .*red.png: there is no such file"):
        passed_on.reraise()


def test_several_turns_share_the_image(backend: Tokenizer, write_rows: WriteRows, tmp_path: Path) -> None:
    """I4: each evaluation sample has the images of its history; the first turn before the image has none."""
    rows = [[user(text("hello")), REPLY, user(image("red.png")), REPLY, user(text("there")), REPLY]]
    samples = load_prompts([write_rows(rows, "dev.jsonl")], vision_encoder(backend))
    assert [sample.images for sample in samples] == [(), (f"{tmp_path}/red.png",), (f"{tmp_path}/red.png",)]
    assert [sample.reference for sample in samples] == ["my friend"] * 3
    placeholder = vision_encoder(backend).placeholders
    assert placeholder is not None
    assert [placeholder.whole_images(sample.prompt_ids.tolist()) for sample in samples] == [0, 1, 1]


def test_a_long_history_keeps_whole_images_only(backend: Tokenizer) -> None:
    """I5: the oldest turn goes with its image; where nothing fits, no image is cut in two."""
    history = [user(image("a"), text("hello")), REPLY, user(*map(image, "bcd")), REPLY]
    kept = {}
    for length in (30, 23, 22, 13, 12, 9):
        encoder = vision_encoder(backend, max_input_length=length, max_images=4)
        conversation = encoder.parse(RawRow("dev.jsonl", 1, 1, history))
        sample = encode_prompts(encoder, conversation, Path("/data"))[1]
        kept[length] = (len(sample.prompt_ids), [Path(where).name for where in sample.images])
        assert sample.prompt_ids.tolist().count(encoder.images.placeholder_id) == 3 * len(sample.images)  # type: ignore[union-attr]
    assert kept == {
        30: (23, ["a", "b", "c", "d"]),
        23: (23, ["a", "b", "c", "d"]),
        22: (13, ["b", "c", "d"]),
        13: (13, ["b", "c", "d"]),
        12: (12, ["b", "c", "d"]),  # without the role token before the first image
        9: (8, ["c", "d"]),
    }
