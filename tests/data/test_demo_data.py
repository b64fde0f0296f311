"""The demo data: its format, its shares, and that dev and test are unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "demo"
SPLITS = {"train": 2000, "dev": 60, "test": 60}

Messages = list[dict[str, str]]


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the parsed lines of one file."""
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def conversations(name: str) -> list[Messages]:
    """Return the messages of each row of one file."""
    return [row["messages"] for row in read_rows(name)]


def attributes(messages: Messages) -> frozenset[str]:
    """Return the `key#value` pairs of the first user turn."""
    first = next(message["content"] for message in messages if message["role"] == "user")
    return frozenset(first.split("*"))


@pytest.mark.parametrize("name", SPLITS)
def test_rows_have_the_guides_format(name: str) -> None:
    """One object a line with `messages` alone; role and content alone in each message, both texts, none empty."""
    rows = read_rows(name)
    assert len(rows) == SPLITS[name]
    for row in rows:
        assert list(row) == ["messages"]
        for message in row["messages"]:
            assert list(message) == ["role", "content"]
            assert message["content"].strip() == message["content"] != ""


@pytest.mark.parametrize("name", SPLITS)
def test_roles_alternate_after_an_optional_system_turn(name: str) -> None:
    """system?, then user and assistant in turn, the assistant last."""
    for messages in conversations(name):
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(turns) // 2 <= 3


@pytest.mark.parametrize("name", SPLITS)
def test_shares_of_english_system_turns_and_longer_chats(name: str) -> None:
    """A tenth English, a tenth with a system turn, 15 in 100 with two or three exchanges."""
    rows = conversations(name)
    assert sum(messages[-1]["content"].isascii() for messages in rows) == len(rows) // 10
    assert sum(messages[0]["role"] == "system" for messages in rows) == len(rows) // 10
    exchanges = [sum(message["role"] == "user" for message in messages) for messages in rows]
    assert sum(count > 1 for count in exchanges) == len(rows) * 15 // 100
    assert {1, 2} <= set(exchanges)


def test_first_prompt_is_an_attribute_list_and_the_text_mentions_it() -> None:
    """Three to five `key#value` pairs; each value after the type stands in the reply."""
    for messages in conversations("train"):
        index = 1 if messages[0]["role"] == "system" else 0
        pairs = [pair.split("#") for pair in messages[index]["content"].split("*")]
        assert 3 <= len(pairs) <= 5
        assert all(len(pair) == 2 for pair in pairs)
        reply = messages[index + 1]["content"].lower()
        assert all(value.lower() in reply for _, value in pairs[1:])


def test_no_combination_occurs_in_two_files() -> None:
    """Dev and test describe sets of attributes that train never shows, nor do they share any."""
    train, dev, test = ({attributes(messages) for messages in conversations(name)} for name in ("train", "dev", "test"))
    assert not dev & train
    assert not test & train
    assert not dev & test


def test_every_single_attribute_of_dev_and_test_occurs_in_train() -> None:
    """What is new in dev and test is the combination, not the words."""
    known = frozenset().union(*(attributes(messages) for messages in conversations("train")))
    for name in ("dev", "test"):
        assert frozenset().union(*(attributes(messages) for messages in conversations(name))) <= known


def test_revisions_ask_for_a_shorter_text_or_another_value() -> None:
    """Later user turns are the known requests, and a shorter text is shorter than the one before it."""
    requests = ("再短一点", "换成", "换一个风格：", "Make it shorter", "Change the color to ", "Change the style to ")
    for messages in conversations("train"):
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        for before, request, after in zip(turns[1::2], turns[2::2], turns[3::2], strict=False):
            assert request["content"].startswith(requests)
            if request["content"] in {"再短一点", "Make it shorter"}:
                assert len(after["content"]) < len(before["content"])


def test_generator_writes_the_committed_files(tmp_path: Path) -> None:
    """The script alone reproduces what is shipped, byte for byte."""
    subprocess.run([sys.executable, str(ROOT / "data" / "make_demo.py"), "--out", str(tmp_path)], check=True)
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DEMO / f"{name}.jsonl").read_bytes()


def test_another_seed_writes_other_rows(tmp_path: Path) -> None:
    """`--seed` has an effect."""
    command = [sys.executable, str(ROOT / "data" / "make_demo.py"), "--seed", "5", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    assert (tmp_path / "dev.jsonl").read_bytes() != (DEMO / "dev.jsonl").read_bytes()


def test_demo_data_is_small() -> None:
    """Below 2 MB in all."""
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 2_000_000
