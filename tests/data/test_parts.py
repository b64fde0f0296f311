"""Images as other tools name them: each becomes an image part, is named, or is refused by place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from glm_edge_ft.data.dataset import build_dataset
from glm_edge_ft.data.image_check import ImageCheck
from glm_edge_ft.data.workers import encode_chunk
from glm_edge_ft.errors import Problem, UserError
from tests.conftest import EncoderMaker
from tests.data.reading import REPLY, USER, encoded, raw, refusal, remarks
from tests.data.vision import text, vision_encoder

WriteRows = Callable[..., Path]

A, B = ({"type": "image", "image": name} for name in ("a.png", "b.png"))


def seen(backend: Tokenizer, value: Any) -> list[Any]:
    """Return the contents of the user turns as the template gets them, with room for three images."""
    conversation = vision_encoder(backend, max_images=3).parse(raw(value))
    return [message.fields["content"] for message in conversation.messages if message.role == "user"]


def asks(content: Any) -> dict[str, Any]:
    """Return a user turn."""
    return {"role": "user", "content": content}


HELLO = text("hello there")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{**USER, "image": "a.png"}, REPLY], [[A, HELLO]]),
        ([{**USER, "images": ["a.png", "b.png"]}, REPLY], [[A, B, HELLO]]),
        ([USER, REPLY, {**USER, "image": "b.png"}, REPLY], [[HELLO], [B, HELLO]]),
        ([asks("see <image>\nwhat?") | {"image": "a.png"}, REPLY], [[text("see "), A, text("what?")]]),
        ({"messages": [USER, REPLY], "image": "a.png"}, [[A, HELLO]]),
        ({"messages": [USER, REPLY, USER, REPLY], "images": ["a.png"]}, [[A, HELLO], [HELLO]]),
        ({"messages": [USER, REPLY], "images": [{"path": "a.png", "bytes": None}]}, [[A, HELLO]]),
        (
            {"messages": [asks("<image>one"), REPLY, asks("two<image>"), REPLY], "images": ["a.png", "b.png"]},
            [[A, text("one")], [text("two"), B]],
        ),
        ({"messages": [asks([{"type": "image"}, HELLO]), REPLY], "images": ["a.png"]}, [[A, HELLO]]),
        ({"messages": [asks([A, HELLO]), REPLY], "images": ["a.png"]}, [[A, HELLO]]),
        ({"messages": [{**USER, "image": None}, {**REPLY, "images": []}], "images": None}, [[HELLO]]),
        ({"messages": [USER, REPLY], "images": [{"path": None, "bytes": None}]}, [[HELLO]]),
        ({"messages": [USER, REPLY], "image": "a.png", "images": None}, [[A, HELLO]]),
        ({"messages": [asks([{"type": "image", "text": None}, HELLO]), REPLY], "image": "a.png"}, [[A, HELLO]]),
        ([asks(json.dumps([A, HELLO])), REPLY], [[A, HELLO]]),
    ],
)
def test_pictures_of_other_layouts_become_image_parts(backend: Tokenizer, value: Any, expected: list[Any]) -> None:
    """K19: in a message's key, beside the messages, with markers or without."""
    assert seen(backend, value) == expected
    assert [note for note in remarks(vision_encoder(backend, max_images=3), value) if "'image" in note] == []


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "<image>what?"}, REPLY], "images": ["a.png", "b.png"]},
        {"messages": [{"role": "user", "content": "<image><image>what?"}, REPLY], "images": ["a.png"]},
        {"messages": [USER, REPLY, USER, REPLY], "images": ["a.png", "b.png"]},
        {"messages": [USER, {"role": "assistant", "content": "<image>"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [A, text("x")]}, REPLY], "images": ["b.png"]},
        {"messages": [{"role": "user", "content": "x", "image": "a.png"}, REPLY], "images": ["b.png"]},
        {"messages": [USER, REPLY], "image": "a.png", "images": ["b.png"]},
        {"messages": [USER, REPLY], "image": ""},
        {"messages": [USER, REPLY], "images": [{"bytes": "iVBORw0KGgo", "path": "a.png"}]},
        {"messages": [USER, REPLY], "image": "https://x.org/a.png"},
        [USER, {**REPLY, "image": "a.png"}],
        [{"role": "system", "content": "s", "image": "a.png"}, USER, REPLY],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, REPLY],
        [{"role": "user", "content": [{"type": "image"}, text("x")]}, REPLY],
        [{"role": "user", "content": [{**text("x"), "image": "a.png"}]}, REPLY],
        [{**USER, "image_path": "a.JPG"}, REPLY],
        {"messages": [USER, REPLY], "imgs": ["https://x.org/a"]},
    ],
)
def test_a_picture_whose_place_is_not_clear_is_refused(backend: Tokenizer, value: Any) -> None:
    """K19: the other way to read the row would be a guess, and without the picture it would be another row."""
    assert refusal(vision_encoder(backend, max_images=3), value)


picture_keys = st.sampled_from(["image", "images", "image_path", "img", "picture", "image_url", "file", "media", "url"])
wrapped = st.sampled_from(
    [
        lambda path: path,
        lambda path: [path],
        lambda path: {"path": path},
        lambda path: [{"url": path}],
        lambda path: [{"bytes": None, "path": path}],
        lambda path: {"image": [path]},
    ]
)
contents = st.sampled_from(
    ["what?", "<image>what?", "what?\n<image>", "<image><image>", [HELLO], [{"type": "image"}, HELLO], [A, HELLO]]
)


@given(key=picture_keys, wrap=wrapped, level=st.integers(-1, 3), first=contents, second=contents)
@settings(max_examples=300)
def test_a_picture_never_vanishes(backend: Tokenizer, key: str, wrap: Any, level: int, first: Any, second: Any) -> None:
    """K19: it is shown, its key is named in the report, or the row is refused; and what is shown is in the ids."""
    row: dict[str, Any] = {"messages": [asks(first), dict(REPLY), asks(second), dict(REPLY)]}
    holder = row if level < 0 else row["messages"][level]
    holder[key] = wrap("new.png")
    encoder = vision_encoder(backend, max_images=3)
    chunk = encode_chunk([raw(row)], encoder)
    if not chunk.problems:
        count = 3 * len(chunk.images[0])
        assert chunk.ids.tolist().count(encoder.images.placeholder_id if encoder.images else -1) == count
        assert "new.png" in chunk.images[0] or any(repr(key) in note for note in chunk.notes)


@pytest.mark.parametrize("holder", ["row", "message"])
def test_chat_fine_tuning_refuses_pictures_in_any_key(make_encoder: EncoderMaker, holder: str) -> None:
    """K19: it shows the model none; null and an empty list are none."""
    for key, value in (("image", "a.png"), ("images", ["a.png"])):
        keys = {key: value}
        row = {"messages": [USER, REPLY], **keys} if holder == "row" else [{**USER, **keys}, REPLY]
        assert "use finetune_vision.py" in refusal(make_encoder("chatml"), row)
    assert encoded(make_encoder("chatml"), {"messages": [{**USER, "images": []}, REPLY], "image": None})


def test_a_marker_without_a_picture_is_named(backend: Tokenizer) -> None:
    """K19: it may be a word of the text, so that it is no mistake; so may a key that is like a picture's."""
    encoder = vision_encoder(backend)
    for mark in ("<image>", "<img>a.png</img>", "<video>"):
        assert any("shows no image" in note for note in remarks(encoder, [asks(mark), REPLY]))
    for keys in ({"image_id": 12}, {"image_caption": "a dog"}, {"source": "web/a.png"}):
        assert remarks(encoder, {"messages": [USER, REPLY], **keys})
    assert remarks(encoder, {"messages": [USER, REPLY], "image": "a.png", "image_path": "b/a.png"})


def test_bytes_of_pictures_in_parquet_are_refused(backend: Tokenizer, tmp_path: Path) -> None:
    """K19: as `datasets` writes a column of images."""
    path = tmp_path / "train.parquet"
    rows = [{"messages": [USER, REPLY], "images": [{"bytes": b"\x89PNG", "path": "a.png"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=r"train\.parquet:1: 'images' must be the path of a file"):
        build_dataset([path], vision_encoder(backend), 1, tmp_path / "cache", progress=False)


def test_bad_rows_and_bad_pictures_are_listed_together(
    backend: Tokenizer, write_rows: WriteRows, tmp_path: Path
) -> None:
    """K19: in the order of the file, 20 of them; where rows with bad pictures are left out, bad rows alone."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"messages": [USER, REPLY], "image": "a.png"}
    gone = {"messages": [USER, REPLY], "image": "gone.png"}
    both = {"message": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}
    path = write_rows([good, gone, {"messages": []}, gone, good, both, *[gone] * 30])

    def found(on_bad_image: Any) -> list[Problem]:
        check = ImageCheck(on_bad_image, progress=False).problems_of
        with pytest.raises(UserError) as caught:
            build_dataset([path], vision_encoder(backend), 1, tmp_path / "c", progress=False, find_bad_images=check)
        return list(caught.value.problems)

    problems = found("error")
    assert [problem.where for problem in problems] == [
        *(f"train.jsonl:{line}" for line in (2, 3, 4, 6, *range(6, 22))),
        "train.jsonl",
    ]
    assert problems[-1].what == "... and 15 more"
    assert [("gone.png" in problem.what) for problem in problems[:5]] == [True, False, True, False, True]
    assert [problem.where for problem in found("skip")] == ["train.jsonl:3", "train.jsonl:6"]
    assert list((tmp_path / "c").iterdir()) == []
