"""A reply as it comes: the pieces are the whole, and nothing is shown that the whole does not have."""

from __future__ import annotations

import pytest
import torch

from glm_edge_ft.data.prompts import clean_prediction
from glm_edge_ft.deploy.chat import ReplyStreamer
from tests.conftest import STOP_TOKENS, TEMPLATES, EncoderMaker, TokenizerMaker

REPLIES = ("hello my friend", "好的😀，走吧。", "", " \n two  lines\n", "a \\ and a \\n inside", "half of it \\")


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_pieces_together_are_the_reply_as_it_was_written(
    template: str, reply: str, make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker
) -> None:
    """E4: for every template, token by token, with what the template writes around the reply and its stop token."""
    encoder, tokenizer = make_encoder(template), make_tokenizer(template)
    written = encoder.reply_format.prefix + reply + encoder.reply_format.closing
    ids = encoder.tokenizer.encode(written).ids
    if not encoder.reply_format.closing_stops:
        ids.append(tokenizer.get_vocab()[STOP_TOKENS["glm"][1]])
    pieces: list[str] = []
    streamer = ReplyStreamer(lambda ids: clean_prediction(encoder, ids), encoder.reply_format, pieces.append)
    streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    shown = []
    for token in ids:
        streamer.put(torch.tensor([token]))
        shown.append(streamer.shown)
    streamer.end()
    assert "".join(pieces) == streamer.shown == reply
    assert all(reply.startswith(text) for text in shown)


def test_it_is_shown_before_its_end(make_encoder: EncoderMaker) -> None:
    """Each token that settles something is seen at once."""
    encoder = make_encoder("glm")
    pieces: list[str] = []
    streamer = ReplyStreamer(lambda ids: clean_prediction(encoder, ids), encoder.reply_format, pieces.append)
    streamer.put(torch.tensor([[5]]))
    for token in encoder.tokenizer.encode("\nhello my friend").ids:
        streamer.put(torch.tensor([token]))
    assert "".join(pieces) == "hello my friend"
    assert len(pieces) > 2


def test_bytes_that_never_become_a_character_are_shown_at_the_end(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker
) -> None:
    """A reply that the length limit cuts inside of a character."""
    encoder = make_encoder("glm")
    ids = encoder.tokenizer.encode("😀").ids
    assert len(ids) > 1
    pieces: list[str] = []
    streamer = ReplyStreamer(lambda ids: clean_prediction(encoder, ids), encoder.reply_format, pieces.append)
    streamer.put(torch.tensor([[5]]))
    streamer.put(torch.tensor(ids[:1]))
    assert pieces == []
    streamer.end()
    assert pieces == [clean_prediction(encoder, ids[:1])]
