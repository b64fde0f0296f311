"""Which text each token of a text covers: found by the lengths of the tokens where they are bytes, else asked for.

A byte-level vocabulary cuts the bytes of a text into pieces, so a sum over the pieces' lengths says where each begins
and ends, without the tokenizer counting characters for all of them, of which a row needs few.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


class TokenizedText(NamedTuple):
    """The tokens of a text, and where they are in it.

    Attributes:
        ids: of the tokens.
        starts, ends: where each token begins and ends, in characters or in bytes of UTF-8; they never decrease.
        text: what was tokenized.
        is_in_bytes: whether places count bytes.
    """

    ids: list[int]
    starts: Sequence[int]
    ends: Sequence[int]
    text: str
    is_in_bytes: bool

    def first_ending_after(self, character: int) -> int:
        """Return the first token that covers anything of the text from that character on."""
        return bisect_right(self.ends, self._place(character))

    def first_starting_at(self, character: int) -> int:
        """Return the first token that covers nothing before that character."""
        return bisect_left(self.starts, self._place(character))

    def starts_before(self, token: int, character: int) -> bool:
        """Say whether a token covers anything before that character."""
        return self.starts[token] < self._place(character)

    def _place(self, character: int) -> int:
        return len(self.text[:character].encode()) if self.is_in_bytes else character


def by_offsets(text: str, encoding: Encoding) -> TokenizedText:
    """Return the tokens with the places that the tokenizer counted, in characters."""
    offsets = encoding.offsets
    return TokenizedText(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets], text, False)


def by_lengths(text: str, ids: list[int], byte_lengths: Sequence[int]) -> TokenizedText | None:
    """Return the tokens with their places in bytes, or None where they do not cover the text as it is.

    Args:
        text: what was tokenized.
        ids: of its tokens.
        byte_lengths: of each token of the vocabulary, as `byte_lengths_of` returns them.
    """
    ends = list(itertools.accumulate(map(byte_lengths.__getitem__, ids)))
    is_in_bytes = not text.isascii()
    size = len(text.encode()) if is_in_bytes else len(text)
    if (ends[-1] if ends else 0) != size:  # a token that takes the spaces around it, for one
        return None
    return TokenizedText(ids, [0, *ends[:-1]] if ids else [], ends, text, is_in_bytes)


def byte_lengths_of(tokenizer: Tokenizer) -> list[int] | None:
    """Return how many bytes of text each token stands for, by its id, or None for a tokenizer not of that kind."""
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    model = description["model"]
    if description["normalizer"] is not None or model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    if model.get("unk_token") is not None or not _cuts_bytes(description["pre_tokenizer"]):
        return None
    added = {token["id"]: token["content"] for token in description["added_tokens"]}
    vocabulary: dict[str, int] = model["vocab"]
    pieces = {number: piece for piece, number in vocabulary.items() if number not in added}
    if not set().union(*pieces.values()) <= set(ByteLevel.alphabet()):
        return None
    lengths = [0] * (max([*pieces, *added], default=-1) + 1)
    for number, piece in pieces.items():
        lengths[number] = len(piece)
    for number, content in added.items():
        lengths[number] = len(content.encode())
    return lengths


def _cuts_bytes(pre_tokenizer: dict[str, Any] | None) -> bool:
    # Whether it turns text into bytes and takes none of them away, nor adds any.
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    splits = [step for step in steps if step["type"] == "Split" and step["behavior"] != "Removed"]
    levels = [step for step in steps if step["type"] == "ByteLevel" and not step["add_prefix_space"]]
    return bool(levels) and len(splits) + len(levels) == len(steps)
