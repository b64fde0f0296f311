"""Rows of other tools that say what is learned: it is honoured, or the row is refused by place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.data.dataset import build_dataset
from glm_edge_ft.data.encoding import DroppedRow
from glm_edge_ft.data.prompts import encode_prompts
from glm_edge_ft.errors import UserError
from tests.conftest import EncoderMaker
from tests.data.reading import REPLY, USER, encoded, learned, raw, refusal, remarks

WriteRows = Callable[..., Path]

NOT_LEARNED: list[dict[str, Any]] = [
    *({key: value} for key in ("loss", "train", "weight", "loss_mask", "loss_scale") for value in (0, 0.0, False)),
    {"training": False},
    {"trainable": 0},
    {"masked": True},
    {"weight": 0, "train": False},
]


@pytest.mark.parametrize("keys", NOT_LEARNED)
def test_a_turn_marked_in_any_tools_way_is_read_but_not_learned(
    make_encoder: EncoderMaker, keys: dict[str, Any]
) -> None:
    """K20: its text is in the row and bears no loss; evaluation does not take it as a reference."""
    encoder = make_encoder("chatml")
    messages = [USER, {**REPLY, "content": "a bad reply", **keys}, USER, REPLY]
    row = encoded(encoder, messages)
    plain = encoded(encoder, [USER, {**REPLY, "content": "a bad reply"}, USER, REPLY])
    assert row.input_ids.tolist() == plain.input_ids.tolist()
    assert learned(encoder, messages) == "my friend<|im_end|>"
    assert [sample.reference for sample in encode_prompts(encoder, encoder.parse(raw(messages)))] == ["my friend"]
    assert remarks(encoder, messages) == []


@pytest.mark.parametrize("keys", [{"weight": 1}, {"train": True}, {"loss": 1.0}, {"masked": False}])
def test_a_turn_that_is_said_to_be_learned_is(make_encoder: EncoderMaker, keys: dict[str, Any]) -> None:
    """K20: one and true change nothing."""
    encoder = make_encoder("chatml")
    assert (
        encoded(encoder, [USER, {**REPLY, **keys}]).loss_mask.tolist()
        == encoded(encoder, [USER, REPLY]).loss_mask.tolist()
    )


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([USER, {**REPLY, "weight": 0.5}], "messages[1]: 'weight' must be true or false"),
        ([USER, {**REPLY, "loss_scale": 2}], "messages[1]: 'loss_scale' must be true or false"),
        ([USER, {**REPLY, "train": "false"}], "messages[1]: 'train' must be true or false"),
        ([USER, {**REPLY, "loss_mask": [0, 1]}], "messages[1]: 'loss_mask' must be true or false"),
        ([USER, {**REPLY, "train_detail": [{"begin_offset": 0}]}], "messages[1]: 'train_detail' chooses parts"),
        ([USER, {**REPLY, "train_detail": True}], "messages[1]: 'train_detail' chooses parts"),
        ([USER, {**REPLY, "loss": True, "weight": 0}], "messages[1]: 'loss' and 'weight' contradict each other"),
        ([{**USER, "weight": 1}, REPLY], "messages[0]: 'weight' says that a user message is learned"),
        ([USER, {**REPLY, "content": [{"type": "text", "text": "a", "loss": False}]}], "'loss' in a part"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make_encoder: EncoderMaker, turns: Any, expected: str) -> None:
    """K20: a fraction, another kind of value, a part of a turn, two words that contradict, a turn of the user."""
    assert expected in refusal(make_encoder("chatml"), turns)


@pytest.mark.parametrize("keys", [{"weight": 0}, {"train": False}, {"loss": 0}, {"loss_mask": 0}])
def test_a_row_marked_as_a_whole_is_dropped_and_counted(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """K20: at the row's level, or in each of its assistant turns."""
    rows = [
        {"messages": [USER, REPLY]},
        {"messages": [USER, REPLY], **keys},
        {"messages": [USER, {**REPLY, **keys}, USER, {**REPLY, **keys}]},
    ]
    dataset, _ = build_dataset([write_rows(rows)], make_encoder("chatml"), 1, tmp_path / "cache", progress=False)
    assert (len(dataset), dataset.report.dropped_rows) == (1, 2)
    assert [place.split(": ")[0] for place in dataset.report.dropped] == ["train.jsonl:2", "train.jsonl:3"]
    assert not any(key in notice for key in keys for notice in dataset.report.notices)
    with pytest.raises(UserError, match="all 1 rows are dropped"):
        build_dataset(
            [write_rows(rows[1:2], "none.jsonl")], make_encoder("chatml"), 1, tmp_path / "cache", progress=False
        )


def test_a_number_beside_the_messages_may_mean_anything(make_encoder: EncoderMaker) -> None:
    """K20: what is no word on learning is named; a list can only be one word a turn or token, and is refused."""
    encoder = make_encoder("chatml")
    assert remarks(encoder, {"messages": [USER, REPLY], "weight": 71.5}) == [
        "key 'weight' has no meaning here and is ignored"
    ]
    assert "train.jsonl:3: 'loss_mask'" in refusal(encoder, {"messages": [USER, REPLY], "loss_mask": [0, 1]})


def test_a_null_says_nothing_and_is_named(make_encoder: EncoderMaker) -> None:
    """K20: as tables write a key that only other turns have."""
    encoder = make_encoder("chatml")
    turns = [{**USER, "weight": None}, {**REPLY, "weight": None}]
    assert learned(encoder, turns) == "my friend<|im_end|>"
    assert remarks(encoder, turns) == ["key 'weight' says nothing: the turn is learned"]


def test_a_dropped_row_is_no_evaluation_sample(make_encoder: EncoderMaker) -> None:
    """K20: nothing supervised, nothing compared."""
    encoder = make_encoder("chatml")
    conversation = encoder.parse(raw({"messages": [USER, REPLY], "train": False}))
    assert isinstance(encoder.encode(conversation), DroppedRow)
    assert encode_prompts(encoder, conversation) == []
