"""Random conversations against a second way of finding the mask: no offsets, no renderings, only bytes.

The reference builds each turn from its structural tokens and the text between them, tokenizes those texts one by one,
and tells from the bytes of each token whether it reaches into the reply. Special tokens split a text, so the ids are
those of the whole, but where a supervised reply begins: no generation gives a token over the end of the prompt and the
beginning of the reply, so the text is cut there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from glm_edge_ft.data.conversation import parse_conversation
from glm_edge_ft.data.encoding import ConversationEncoder, DroppedRow, EncodedRow
from glm_edge_ft.data.rows import RawRow
from tests.conftest import SPECIAL_TOKENS, TEMPLATES, EncoderMaker, TokenizerMaker

ROLES = ("system", "user", "assistant", "observation")

texts = st.lists(
    st.text(max_size=6)
    | st.sampled_from(
        [
            *SPECIAL_TOKENS,
            "\n",
            "\n\n",
            " ",
            "\\n",
            "\\",
            "n",
            "<|",
            "|>",
            "user",
            "<|user",
            "how are you",
            "裤子",
            "👩‍👧",
            "e\u0301",
        ]
    ),
    max_size=5,
).map("".join)
messages = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts}, optional={"loss": st.just(False)})
conversations = st.lists(messages, min_size=1, max_size=6)


@dataclass(frozen=True)
class Shape:
    """How a template writes a turn: `opening` token, `head`, content, `tail`, `closing` token, `after`."""

    head: str
    boundary: str  # the part of `head` that belongs to the generation prompt
    tail: str
    chatml: bool = False


SHAPES = {
    "glm": Shape("\n", "", ""),
    "glm-newline": Shape("\n", "\n", ""),
    "glm-literal": Shape("\\n", "\\n", "\\n"),
    "chatml": Shape("\n", "\n", "", chatml=True),
}


def byte_length(tokenizer: PreTrainedTokenizerFast, token_id: int) -> int:
    """Return how many bytes of text a token stands for; the byte-level vocabulary has one character a byte."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    return len(token.encode("utf-8")) if token in SPECIAL_TOKENS else len(token)


def reference(
    tokenizer: PreTrainedTokenizerFast, template: str, turns: list[dict[str, Any]]
) -> tuple[list[int], list[bool]]:
    """Return ids and mask of a conversation, turn by turn."""
    shape, vocabulary = SHAPES[template], tokenizer.get_vocab()
    ids: list[int] = []
    mask: list[bool] = []
    previous_is_supervised = False
    for turn in turns:
        role = turn["role"]
        supervised = role == "assistant" and turn.get("loss", True)
        if shape.chatml:
            ids.append(vocabulary["<|im_start|>"])
            mask.append(False)
            head, boundary = f"{role}\n", f"{role}\n"
        else:
            ids.append(vocabulary[f"<|{role}|>"])
            mask.append(previous_is_supervised and role in ("user", "observation"))
            head, boundary = shape.head, shape.boundary
        text = f"{head}{turn['content']}{shape.tail}"
        pieces = [text[: len(boundary)], text[len(boundary) :]] if supervised else [text]
        body = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        reached = 0
        for token_id in body:
            starts_in_boundary = reached < len(boundary.encode())
            reached += byte_length(tokenizer, token_id)
            reaches_reply = reached > len(boundary.encode())
            is_special = tokenizer.convert_ids_to_tokens(token_id) in SPECIAL_TOKENS
            mask.append(supervised and reaches_reply and not (starts_in_boundary and is_special))
            ids.append(token_id)
        if shape.chatml:
            ids += [vocabulary["<|im_end|>"], *tokenizer("\n", add_special_tokens=False)["input_ids"]]
            mask += [supervised, False]
        previous_is_supervised = supervised
    if turns[-1]["role"] == "assistant" and not shape.chatml:
        ids.append(vocabulary["<|user|>"])
        mask.append(turns[-1].get("loss", True))
    return ids, mask


def encode(encoder: ConversationEncoder, turns: list[dict[str, Any]]) -> EncodedRow | DroppedRow:
    """Encode messages, as read from line 1 of x.jsonl."""
    return encoder.encode(parse_conversation(RawRow("x.jsonl", 1, 1, turns), encoder.reply_format.rendered_roles))


def begins_in_the_prompt(turns: list[dict[str, Any]]) -> bool:
    """Say whether a supervised reply begins with what a token may join to the line break before it."""
    return any(
        turn["role"] == "assistant" and turn.get("loss", True) and turn["content"][:1].isspace() for turn in turns
    )


def has_supervised_turn(turns: list[dict[str, Any]]) -> bool:
    """Say whether the conversation is one that can be encoded."""
    return any(turn["role"] == "assistant" and turn.get("loss", True) for turn in turns) and not any(
        turn["role"] != "assistant" and turn.get("loss") for turn in turns
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_and_mask_equal_an_independent_reference(
    template: str, make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker
) -> None:
    """M1: for random conversations, ids are the template applied to the whole, and the mask is the reference's."""
    encoder, tokenizer = make_encoder(template), make_tokenizer(template)

    @given(turns=conversations)
    @settings(max_examples=250)
    def check(turns: list[dict[str, Any]]) -> None:
        assume(has_supervised_turn(turns))
        ids, mask = reference(tokenizer, template, turns)
        row = encode(encoder, turns)
        if not any(mask):
            assert isinstance(row, DroppedRow)
            return
        assert isinstance(row, EncodedRow)
        plain = [{key: value for key, value in turn.items() if key != "loss"} for turn in turns]
        whole: Any = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
        appended = [] if turns[-1]["role"] != "assistant" or template == "chatml" else [ids[-1]]
        assert row.input_ids.tolist() == ids
        if begins_in_the_prompt(turns):
            assert tokenizer.decode(ids) == tokenizer.decode(whole + appended)
        else:
            assert ids == whole + appended
        assert row.loss_mask.tolist() == mask

    check()


def runs(mask: list[bool]) -> list[tuple[int, int]]:
    """Return the ranges of True."""
    edges = [
        index for index in range(len(mask) + 1) if (index < len(mask) and mask[index]) != (index and mask[index - 1])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("template", TEMPLATES)
def test_budgets_hold_for_any_conversation(
    template: str, make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker
) -> None:
    """M2: no prompt and no reply is over its budget, and what is kept is a prefix of the whole row."""
    tokenizer = make_tokenizer(template)
    encoders = {(prompt, reply): make_encoder(template, prompt, reply) for prompt in (6, 12, 30) for reply in (1, 3, 8)}

    @given(turns=conversations, budgets=st.sampled_from(sorted(encoders)))
    @settings(max_examples=250)
    def check(turns: list[dict[str, Any]], budgets: tuple[int, int]) -> None:
        assume(has_supervised_turn(turns))
        row = encode(encoders[budgets], turns)
        if isinstance(row, DroppedRow):
            return
        mask = row.loss_mask.tolist()
        assert len(mask) <= sum(budgets)
        assert any(mask)
        assert all(start <= budgets[0] for start, _ in runs(mask))
        if row.prompt_tokens_cut == 0:
            ids, whole_mask = reference(tokenizer, template, turns)
            assert row.input_ids.tolist() == ids[: len(mask)]
            assert all(not kept or whole for kept, whole in zip(mask, whole_mask, strict=False))
            assert len(ids) == len(mask) + row.reply_tokens_cut + row.tail_tokens_cut

    check()
