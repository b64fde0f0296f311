"""The vision demo's data: its format, its shares, that guessing does not help, and that dev and test are unseen."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "demo_vision"
SPLITS = {"train": 1400, "dev": 80, "test": 80}
MAKER = ROOT / "data" / "make_demo_vision.py"
KINDS = {  # what a question asks for, by words of it, first match wins
    "time": ("白天还是晚上", "day or night"),
    "number": ("几个", "几棵", "How many"),
    "colour": ("什么颜色", "What color"),
    "kind": ("什么形状", "What shape"),
    "zone": ("在哪", "在什么位置", "Where"),
}

Row = dict[str, Any]


def read_rows(name: str) -> list[Row]:
    """Return the parsed lines of one file."""
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def images_of(row: Row) -> list[str]:
    """Return the paths of a row's images."""
    parts = [part for message in row["messages"] if isinstance(message["content"], list) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, whichever way it is written."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def exchanges_of(row: Row) -> list[tuple[str, str]]:
    """Return the questions and answers of a row."""
    turns = [message for message in row["messages"] if message["role"] != "system"]
    return [(text_of(question), text_of(reply)) for question, reply in zip(turns[::2], turns[1::2], strict=True)]


def visual_exchanges(name: str) -> list[tuple[str, str]]:
    """Return the exchanges about pictures of one file, as a kind of question and an answer."""
    found = []
    for row in read_rows(name):
        turns = [message for message in row["messages"] if message["role"] != "system"]
        shown = False
        for question, reply in zip(turns[::2], turns[1::2], strict=True):
            shown = shown or bool(images_of({"messages": [question]}))
            if shown:
                text = text_of(question)
                kind = next(kind for kind, marks in KINDS.items() if any(mark in text for mark in marks))
                found.append((f"{kind} {'en' if text.isascii() else 'zh'}", text_of(reply)))
    return found


def pixel_hashes(name: str) -> set[str]:
    """Return a hash of the pixels of every image of one file."""
    hashes = set()
    for row in read_rows(name):
        for path in images_of(row):
            with Image.open(DEMO / path) as image:
                hashes.add(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest())
    return hashes


@pytest.mark.parametrize("name", SPLITS)
def test_rows_have_the_guides_format(name: str) -> None:
    """D4: messages of role and content; content a list of text and image parts, or a text; no text is empty."""
    rows = read_rows(name)
    assert len(rows) == SPLITS[name]
    for row in rows:
        assert list(row) == ["messages"]
        for message in row["messages"]:
            assert list(message) == ["role", "content"]
            assert text_of(message).strip() == text_of(message) != ""
            if isinstance(message["content"], list):
                assert {tuple(part) for part in message["content"]} <= {("type", "text"), ("type", "image")}


@pytest.mark.parametrize("name", SPLITS)
def test_every_picture_exists_and_belongs_to_one_row(name: str) -> None:
    """I4: at most one image a row, in a user turn, its path relative to the data file."""
    paths = []
    for row in read_rows(name):
        of_row = images_of({"messages": [message for message in row["messages"] if message["role"] == "user"]})
        assert of_row == images_of(row)
        assert len(of_row) <= 1
        paths += of_row
    assert len(paths) == len(set(paths))
    assert all((DEMO / path).is_file() for path in paths)


@pytest.mark.parametrize("name", SPLITS)
def test_a_tenth_of_the_rows_is_text_alone_and_a_fifth_english(name: str) -> None:
    """I2: rows without an image are mixed in, and are no more than that."""
    rows = read_rows(name)
    assert sum(not images_of(row) for row in rows) == len(rows) // 10
    assert sum(exchanges_of(row)[-1][1].isascii() for row in rows) == len(rows) // 5
    several = sum(len(exchanges_of(row)) > 1 for row in rows) / len(rows)
    assert 0.7 < several < 0.9 if name == "train" else 0.25 < several < 0.5


@pytest.mark.parametrize("name", SPLITS)
def test_no_turn_tells_the_answer_of_a_later_one(name: str) -> None:
    """Else the text before it would do instead of the picture."""
    for row in read_rows(name):
        told = ""
        for question, reply in exchanges_of(row):
            assert not told or reply.lower() not in told or not images_of(row)
            told += f"{question} {reply} ".lower()


def test_train_has_every_form_that_the_guide_allows() -> None:
    """I4, D4: text before the image, the image in the second turn, plain strings, system turns; PNG and JPEG."""
    rows = read_rows("train")
    starts = Counter(row["messages"][0]["role"] for row in rows)
    assert starts["system"] == 4
    user_parts = [m["content"] for row in rows for m in row["messages"] if m["role"] == "user"]
    orders = Counter(tuple(part["type"] for part in parts) for parts in user_parts if isinstance(parts, list))
    assert orders["image", "text"] > 700
    assert orders["text", "image"] > 50
    assert sum(isinstance(parts, str) for parts in user_parts) > 20
    later = [row for row in rows if images_of(row) and starts and not images_of({"messages": row["messages"][:2]})]
    assert len(later) > 20
    endings = Counter(Path(path).suffix for row in rows for path in images_of(row))
    assert endings[".png"] > 700
    assert endings[".jpg"] > 50


def test_no_picture_of_dev_or_test_occurs_elsewhere() -> None:
    """What is evaluated was never trained on, pixel by pixel."""
    train, dev, test = (pixel_hashes(name) for name in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (1260, 72, 72)
    assert not dev & train
    assert not test & train
    assert not dev & test


@pytest.mark.parametrize("name", ["dev", "test"])
def test_guessing_by_the_kind_of_question_stays_below_a_quarter(name: str) -> None:
    """Who knows what is asked for, and gives training's most frequent answer to it, is right in less than 25 of 100."""
    usual: dict[str, Counter[str]] = {}
    for kind, reply in visual_exchanges("train"):
        usual.setdefault(kind, Counter())[reply] += 1
    guesses = {kind: replies.most_common(1)[0][0] for kind, replies in usual.items()}
    asked = visual_exchanges(name)
    right = sum(reply == guesses[kind] for kind, reply in asked)
    assert len(asked) > 90
    assert right / len(asked) < 0.25


def test_answers_are_short_and_known() -> None:
    """Every answer of dev and test occurs in train; none is longer than a few words."""
    known = {reply for row in read_rows("train") for _, reply in exchanges_of(row)}
    for name in ("dev", "test"):
        replies = {reply for row in read_rows(name) for _, reply in exchanges_of(row)}
        assert replies <= known
        assert max(map(len, replies)) <= 12


def test_english_answers_begin_with_a_capital() -> None:
    """The template's letter n before a reply would melt with a small letter in the tokenizer."""
    for name in SPLITS:
        for row in read_rows(name):
            assert all(reply[0].isupper() for _, reply in exchanges_of(row) if reply.isascii())


def test_generator_writes_the_committed_files(tmp_path: Path) -> None:
    """The script alone reproduces what is shipped: rows byte for byte, pictures pixel by pixel (JPEG nearly)."""
    subprocess.run([sys.executable, str(MAKER), "--out", str(tmp_path)], check=True)
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DEMO / f"{name}.jsonl").read_bytes()
    written = {file.name for file in (tmp_path / "images").iterdir()}
    assert written == {file.name for file in (DEMO / "images").iterdir()}
    for name in sorted(written):
        with Image.open(tmp_path / "images" / name) as new, Image.open(DEMO / "images" / name) as old:
            assert new.size == old.size
            if name.endswith(".png"):
                assert new.convert("RGB").tobytes() == old.convert("RGB").tobytes()


def test_another_seed_writes_other_rows(tmp_path: Path) -> None:
    """`--seed` has an effect."""
    subprocess.run([sys.executable, str(MAKER), "--seed", "5", "--out", str(tmp_path)], check=True)
    assert (tmp_path / "dev.jsonl").read_bytes() != (DEMO / "dev.jsonl").read_bytes()


def test_demo_data_is_small() -> None:
    """Below 3 MB in all."""
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 3_000_000
