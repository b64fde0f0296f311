"""Places in bytes against those that the tokenizer counts in characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from glm_edge_ft.data.token_places import TokenizedText, by_lengths, by_offsets, byte_lengths_of
from tests.conftest import SPECIAL_TOKENS

texts = st.lists(
    st.text(max_size=5) | st.sampled_from([*SPECIAL_TOKENS, " ", "裤子", "👩‍👧", "e\u0301"]), max_size=6
).map("".join)


def places_of(tokens: TokenizedText) -> list[tuple[int, int, list[bool]]]:
    """Return everything that can be asked, for each character of the text and its end."""
    return [
        (
            tokens.first_ending_after(character),
            tokens.first_starting_at(character),
            [tokens.starts_before(token, character) for token in range(len(tokens.ids))],
        )
        for character in range(len(tokens.text) + 1)
    ]


@settings(deadline=None)
@given(text=texts)
def test_lengths_say_what_offsets_say(backend: Tokenizer, text: str) -> None:
    """Every place of any text: characters of several bytes that the vocabulary cuts, too."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = None  # it trims spaces off the offsets
    lengths = byte_lengths_of(copy)
    assert lengths is not None
    encoding = copy.encode(text, add_special_tokens=False)
    ids = copy.encode_batch_fast([text], add_special_tokens=False)[0].ids
    tokens = by_lengths(text, ids, lengths)
    assert tokens is not None
    assert tokens.ids == encoding.ids
    assert places_of(tokens) == places_of(by_offsets(text, encoding))


def test_places_written_out(backend: Tokenizer) -> None:
    """The vocabulary has no token for the emoji: its four bytes are one character, and so for the offsets."""
    lengths = byte_lengths_of(backend)
    assert lengths is not None
    text = "<|user|>\n🙂a"
    ids = backend.encode(text, add_special_tokens=False).ids
    tokens = by_lengths(text, ids, lengths)
    assert tokens is not None
    assert (tokens.starts, tokens.ends) == ([0, 8, 9, 10, 11, 12, 13], [8, 9, 10, 11, 12, 13, 14])
    assert tokens.is_in_bytes
    assert [tokens.first_ending_after(character) for character in (0, 8, 9, 10, 11)] == [0, 1, 2, 6, 7]
    assert [tokens.first_starting_at(character) for character in (0, 8, 9, 10, 11)] == [0, 1, 2, 6, 7]


def test_a_token_that_takes_spaces_is_not_measured_by_its_length(backend: Tokenizer) -> None:
    """Its text alone would leave the spaces to no token, and shift all that follows."""
    greedy = Tokenizer.from_str(backend.to_str())
    greedy.add_special_tokens([AddedToken("<|reply|>", special=True, normalized=False, rstrip=True)])
    lengths = byte_lengths_of(greedy)
    assert lengths is not None
    for text, is_measured in (("<|reply|>a", True), ("<|reply|>  a", False)):
        ids = greedy.encode(text, add_special_tokens=False).ids
        assert (by_lengths(text, ids, lengths) is not None) == is_measured


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])},
        {"model": models.WordLevel({"a": 0}, unk_token="a")},
        {"model": models.BPE({"a": 0, "龘": 1}, [])},
    ],
)
def test_other_tokenizers_are_asked(backend: Tokenizer, change: dict[str, object]) -> None:
    """Where a text is changed before it is cut, or cut into something else than bytes, lengths say nothing."""
    other = Tokenizer.from_str(backend.to_str())
    for name, value in change.items():
        setattr(other, name, value)
    assert byte_lengths_of(other) is None
