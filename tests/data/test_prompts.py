"""Evaluation samples, and generated ids back to text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glm_edge_ft.data.conversation import Conversation, parse_conversation
from glm_edge_ft.data.encoding import ConversationEncoder, EncodedRow
from glm_edge_ft.data.prompts import clean_prediction, encode_prompts
from glm_edge_ft.data.rows import RawRow
from tests.conftest import SPECIAL_TOKENS, TEMPLATES, EncoderMaker, TokenizerMaker

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "hello"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "you are fine"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "my friend", "loss": False},
    {"role": "user", "content": "today"},
    {"role": "assistant", "content": "the time"},
]


def conversation_of(encoder: ConversationEncoder, turns: list[dict[str, Any]] = TURNS) -> Conversation:
    """Return a conversation from line 4 of dev.jsonl."""
    return parse_conversation(RawRow("dev.jsonl", 4, 1, turns), encoder.reply_format.rendered_roles)


def test_one_sample_for_each_supervised_turn(make_encoder: EncoderMaker) -> None:
    """E2: the true history up to the assistant marker, no text of the reference."""
    encoder = make_encoder("glm")
    samples = encode_prompts(encoder, conversation_of(encoder))
    assert [(sample.prompt, sample.reference, sample.turn) for sample in samples] == [
        ("<|system|>\nhello<|user|>\nhow are you<|assistant|>", "you are fine", 2),
        (
            "<|system|>\nhello<|user|>\nhow are you<|assistant|>\nyou are fine"
            "<|user|>\nhello there<|assistant|>\nmy friend<|user|>\ntoday<|assistant|>",
            "the time",
            6,
        ),
    ]
    assert [(sample.file, sample.line, sample.prompt_tokens_cut) for sample in samples] == [("dev.jsonl", 4, 0)] * 2


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_ids_are_those_of_the_template(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker, template: str
) -> None:
    """E2: as `apply_chat_template(..., add_generation_prompt=True)` gives them."""
    encoder = make_encoder(template)
    samples = encode_prompts(encoder, conversation_of(encoder))
    history = [{key: value for key, value in turn.items() if key != "loss"} for turn in TURNS]
    expected: Any = make_tokenizer(template).apply_chat_template(
        history[:6], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert samples[1].prompt_ids.tolist() == expected


@pytest.mark.parametrize(
    ("budget", "prompt", "cut"),
    [
        (22, "<|system|>\nhello<|user|>\nhello there<|assistant|>\nmy friend<|user|>\ntoday<|assistant|>", 10),
        (12, "<|system|>\nhello<|user|>\ntoday<|assistant|>", 18),
    ],
)
def test_a_long_history_loses_its_oldest_turns(make_encoder: EncoderMaker, budget: int, prompt: str, cut: int) -> None:
    """M2: whole turns, the system message stays, the newest question is whole."""
    encoder = make_encoder("glm", budget, 8)
    sample = encode_prompts(encoder, conversation_of(encoder))[1]
    assert (sample.prompt, sample.prompt_tokens_cut) == (prompt, cut)
    assert len(sample.prompt_ids) <= budget
    assert (sample.turn, sample.reference) == (6, "the time")


def test_a_long_question_is_shortened_as_in_training(make_encoder: EncoderMaker) -> None:
    """M2: the model is asked what it was trained on."""
    encoder = make_encoder("glm", 16, 8)
    turns = [{"role": "user", "content": "how are you, " * 16}, {"role": "assistant", "content": "ok"}]
    row = encoder.encode(conversation_of(encoder, turns))
    assert isinstance(row, EncodedRow)
    sample = encode_prompts(encoder, conversation_of(encoder, turns))[0]
    assert sample.prompt_ids.tolist() == row.input_ids.tolist()[:16]
    assert sample.prompt_tokens_cut == row.prompt_tokens_cut


def test_no_sample_is_left_out(make_encoder: EncoderMaker) -> None:
    """M2: where nothing fits, the newest tokens remain, so that each row counts in the metrics."""
    encoder = make_encoder("glm", 4, 8)
    turns = [{"role": "system", "content": "hello " * 20}, *TURNS[1:3]]
    sample = encode_prompts(encoder, conversation_of(encoder, turns))[0]
    whole = encode_prompts(make_encoder("glm"), conversation_of(encoder, turns))[0]
    assert sample.prompt_ids.tolist() == whole.prompt_ids.tolist()[-4:]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_generated_reply_reads_like_its_reference(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker, template: str
) -> None:
    """E2: what a perfect model generates is exactly the reference, whatever follows the stop token."""
    encoder, tokenizer = make_encoder(template), make_tokenizer(template)

    @given(text=st.text(max_size=20))
    @settings(max_examples=100)
    def check(text: str) -> None:
        assume(not any(token in text for token in SPECIAL_TOKENS))  # those are no text to the tokenizer
        reply = f"{encoder.reply_format.prefix}{text}{encoder.reply_format.closing}"
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        if not encoder.reply_format.closing_stops:
            ids = [*ids, encoder.reply_format.stop_id]
        garbage = tokenizer("hello there", add_special_tokens=False)["input_ids"]
        assert clean_prediction(encoder, [*ids, *garbage]) == text

    check()


def test_a_reply_without_a_stop_token_is_kept_whole(make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker) -> None:
    """E1: generation that ran into its limit, and none at all."""
    encoder, tokenizer = make_encoder("glm"), make_tokenizer("glm")
    assert clean_prediction(encoder, tokenizer("\nmy friend")["input_ids"]) == "my friend"
    assert clean_prediction(encoder, tokenizer("my friend")["input_ids"]) == "my friend"
    assert clean_prediction(encoder, []) == ""
