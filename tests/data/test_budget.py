"""The two budgets, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from glm_edge_ft.data.conversation import parse_conversation
from glm_edge_ft.data.encoding import ConversationEncoder, DroppedRow, EncodedRow
from glm_edge_ft.data.rows import RawRow
from tests.conftest import EncoderMaker, TokenizerMaker

USER = {"role": "user", "content": "how are you"}
REPLY = {"role": "assistant", "content": "you are fine"}


@pytest.fixture
def tokenizer(make_tokenizer: TokenizerMaker) -> PreTrainedTokenizerFast:
    """Decodes; its template is not used."""
    return make_tokenizer("glm")


def encode(encoder: ConversationEncoder, messages: list[dict[str, Any]]) -> EncodedRow | DroppedRow:
    """Encode messages, as read from line 1 of train.jsonl."""
    row = RawRow("train.jsonl", 1, 1, messages)
    return encoder.encode(parse_conversation(row, encoder.reply_format.rendered_roles))


def shown(row: EncodedRow | DroppedRow, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the row as text, tokens separated by bars, supervised ones with a star, line breaks as ⏎."""
    assert isinstance(row, EncodedRow)
    tokens = zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True)
    return "|".join(("*" if mask else "") + str(tokenizer.decode([token])) for token, mask in tokens).replace("\n", "⏎")


def cuts(row: EncodedRow | DroppedRow) -> tuple[int, int, int]:
    """Return how many tokens the prompt, the reply and the tail lost."""
    assert isinstance(row, EncodedRow)
    return row.prompt_tokens_cut, row.reply_tokens_cut, row.tail_tokens_cut


def test_a_row_within_the_budgets_is_whole(make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast) -> None:
    """M2: exactly as long as the budgets, the reply's line break and stop token included."""
    row = encode(make_encoder("glm", 6, 5), [USER, REPLY])
    assert shown(row, tokenizer) == "<|user|>|⏎|how| are| you|<|assistant|>|*⏎|*you|* are|* fine|*<|user|>"
    assert cuts(row) == (0, 0, 0)


def test_a_cut_reply_teaches_no_stop(make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast) -> None:
    """M2: the reply ends in the middle, and nothing follows."""
    row = encode(make_encoder("glm", 6, 3), [USER, REPLY])
    assert shown(row, tokenizer) == "<|user|>|⏎|how| are| you|<|assistant|>|*⏎|*you|* are"
    assert cuts(row) == (0, 2, 0)


def test_nothing_follows_a_cut_reply(make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast) -> None:
    """M2: later turns would see a broken history."""
    row = encode(make_encoder("glm", 40, 4), [USER, REPLY, USER, {"role": "assistant", "content": "you"}])
    assert shown(row, tokenizer) == "<|user|>|⏎|how| are| you|<|assistant|>|*⏎|*you|* are|* fine"
    assert cuts(row) == (0, 1, 8)


def test_a_reply_of_exactly_its_budget_is_not_cut(
    make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    """M2: the turns after it stay."""
    row = encode(make_encoder("glm", 40, 5), [USER, REPLY, USER, {"role": "assistant", "content": "you"}])
    assert shown(row, tokenizer).endswith(
        "|*⏎|*you|* are|* fine|*<|user|>|⏎|how| are| you|<|assistant|>|*⏎|*you|*<|user|>"
    )
    assert cuts(row) == (0, 0, 0)


def test_a_long_question_is_shortened_and_its_reply_stays_whole(
    make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    """M2: a question of 200 characters, the answer "ok", 16 and 8: the markers and the reply are whole."""
    question = {"role": "user", "content": "how are you, " * 16}
    row = encode(make_encoder("glm", 16, 8), [question, {"role": "assistant", "content": "ok"}])
    assert shown(row, tokenizer) == (
        "<|user|>|⏎|how| are| you|,| how| are| you|,| how| are| you|,| how|<|assistant|>|*⏎|*o|*k|*<|user|>"
    )
    whole = encode(make_encoder("glm"), [question, {"role": "assistant", "content": "ok"}])
    assert isinstance(whole, EncodedRow)
    assert cuts(row) == (whole.loss_mask.tolist().index(True) - 16, 0, 0)


def test_a_shortened_row_is_the_template_applied_to_the_shortened_text(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker
) -> None:
    """M2: characters of several tokens are kept or cut whole."""
    row = encode(make_encoder("chatml", 20, 8), [{"role": "user", "content": "龘" * 30}, REPLY])
    assert isinstance(row, EncodedRow)
    kept = make_tokenizer("chatml").decode(row.input_ids.tolist()).count("龘")
    assert 0 < kept < 30
    shortened = [{"role": "user", "content": "龘" * kept}, REPLY]
    whole: Any = make_tokenizer("chatml").apply_chat_template(shortened, tokenize=True, return_dict=False)
    assert row.input_ids.tolist() == whole


def test_only_the_last_user_text_is_shortened(make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast) -> None:
    """M2: the system turn stays whole."""
    system = {"role": "system", "content": "hello there"}
    row = encode(make_encoder("glm", 9, 8), [system, USER, REPLY])
    assert shown(row, tokenizer) == (
        "<|system|>|⏎|hello| there|<|user|>|⏎|how| are|<|assistant|>|*⏎|*you|* are|* fine|*<|user|>"
    )
    assert cuts(row) == (1, 0, 0)


def test_later_turns_over_the_budget_are_left_out(
    make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    """M2: the row ends with the stop token of the turn before, still a prefix of the whole."""
    row = encode(make_encoder("glm", 15, 8), [USER, REPLY, USER, REPLY])
    assert shown(row, tokenizer) == "<|user|>|⏎|how| are| you|<|assistant|>|*⏎|*you|* are|* fine|*<|user|>"
    assert cuts(row) == (0, 0, 10)
    row = encode(make_encoder("chatml", 24, 8), [USER, REPLY, USER, REPLY])
    assert shown(row, tokenizer).endswith("|*you|* are|* fine|*<|im_end|>")


def test_a_reply_without_loss_is_history_and_never_cut(
    make_encoder: EncoderMaker, tokenizer: PreTrainedTokenizerFast
) -> None:
    """M2: `max_output_length` bounds what is learnt."""
    row = encode(
        make_encoder("glm", 40, 2), [USER, {**REPLY, "loss": False}, USER, {"role": "assistant", "content": ""}]
    )
    assert shown(row, tokenizer) == (
        "<|user|>|⏎|how| are| you|<|assistant|>|⏎|you| are| fine|<|user|>|⏎|how| are| you|<|assistant|>|*⏎|*<|user|>"
    )


def test_what_follows_the_last_reply_stays_where_there_is_room(make_encoder: EncoderMaker) -> None:
    """M2: and is left out as a whole where there is not."""
    with_room = encode(make_encoder("glm", 10, 8), [USER, REPLY, USER])
    without = encode(make_encoder("glm", 7, 6), [USER, REPLY, USER])
    assert isinstance(with_room, EncodedRow)
    assert isinstance(without, EncodedRow)
    assert (len(with_room.input_ids), len(without.input_ids), without.tail_tokens_cut) == (15, 11, 4)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [{"role": "system", "content": "hello " * 20}, USER, REPLY],
            "tokens, 3 of them the user's text: nothing of it would be left, max_input_length is 16",
        ),
        (
            [{"role": "system", "content": "hello " * 20}, REPLY],
            "tokens and has no user text to shorten, max_input_length is 16",
        ),
    ],
)
def test_a_prompt_that_cannot_be_shortened_drops_the_row(
    make_encoder: EncoderMaker, messages: list[dict[str, Any]], reason: str
) -> None:
    """M2: dropped with its place and the numbers."""
    row = encode(make_encoder("glm", 16, 8), messages)
    assert isinstance(row, DroppedRow)
    assert (row.file, row.line) == ("train.jsonl", 1)
    assert row.reason.startswith("the prompt of the first reply takes ")
    assert row.reason.endswith(reason)
