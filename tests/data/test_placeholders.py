"""Images in the ids: placeholders from the template, their number, what is cut and what is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from glm_edge_ft.data.encoding import ConversationEncoder, DroppedRow, EncodedRow
from glm_edge_ft.data.placeholders import IMAGE_TURN_TOKENS, ImageSettings
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import UserError
from tests.conftest import SPECIAL_TOKENS, TEMPLATES
from tests.data.vision import (
    IMAGE,
    PLACEHOLDER,
    REPLY,
    literal_template,
    released_template,
    text,
    user,
    vision_encoder,
    vision_tokenizer,
)


def encode(encoder: ConversationEncoder, messages: Any) -> EncodedRow | DroppedRow:
    """Encode messages that stand in line 1 of train.jsonl."""
    return encoder.encode(encoder.parse(RawRow("train.jsonl", 1, 1, messages)))


def encoded(encoder: ConversationEncoder, messages: Any) -> EncodedRow:
    """Encode messages that give a row."""
    row = encode(encoder, messages)
    assert isinstance(row, EncodedRow)
    return row


def marked(encoder: ConversationEncoder, row: EncodedRow) -> str:
    """Return the tokens as text, separated by `|`, supervised ones with a star before them, placeholders as `@`."""
    tokens = [encoder.tokenizer.backend.decode([token], skip_special_tokens=False) for token in row.input_ids.tolist()]
    texts = [f"{'*' * int(mask)}{token}" for token, mask in zip(tokens, row.loss_mask.tolist(), strict=True)]
    return "|".join(texts).replace(PLACEHOLDER, "@").replace("\n", "⏎")


def test_image_then_text(backend: Tokenizer) -> None:
    """I4, M1: the run of placeholders, the text, and nothing of both is supervised."""
    encoder = vision_encoder(backend)
    row = encoded(encoder, [user(IMAGE, text("hello there")), REPLY])
    assert marked(encoder, row) == "<|user|>|⏎|@|@|@|hello| there|<|assistant|>|⏎|*my|* friend|*<|user|>"
    assert row.images == ("a.png",)


def test_text_then_image(backend: Tokenizer) -> None:
    """I4: parts keep their order."""
    encoder = vision_encoder(backend)
    row = encoded(encoder, [user(text("hello"), IMAGE, text(" there")), REPLY])
    assert marked(encoder, row) == "<|user|>|⏎|hello|@|@|@| there|<|assistant|>|⏎|*my|* friend|*<|user|>"


def test_an_image_in_the_second_turn_with_literal_line_breaks(backend: Tokenizer) -> None:
    """I4, M1: backslash and n, which close each content, are supervised after a reply."""
    encoder = vision_encoder(backend, literal_template(3))
    turns = [user(text("hello")), REPLY, user(IMAGE), {"role": "assistant", "content": "you"}]
    assert marked(encoder, encoded(encoder, turns)) == (
        "<|user|>|\\|n|hello|\\|n|<|assistant|>|\\|n|*my|* friend|*\\|*n|*<|user|>|\\|n|@|@|@|\\|n|<|assistant|>|\\|n"
        "|*you|*\\|*n|*<|user|>"
    )


def test_two_images_where_the_limit_allows(backend: Tokenizer) -> None:
    """I4: each image has a run of its own, in order."""
    encoder = vision_encoder(backend, max_images=2)
    other = {"type": "image", "image": "b.png"}
    row = encoded(encoder, [user(IMAGE, other), REPLY])
    assert marked(encoder, row) == "<|user|>|⏎|@|@|@|@|@|@|<|assistant|>|⏎|*my|* friend|*<|user|>"
    assert (row.images, row.roles.image, row.roles.template) == (("a.png", "b.png"), 6, 5)


def test_the_released_number_of_placeholders(backend: Tokenizer) -> None:
    """I4: 578 for an image, in one run."""
    encoder = vision_encoder(backend, count=578)
    row = encoded(encoder, [user(IMAGE, text("hello")), REPLY])
    ids = row.input_ids.tolist()
    assert marked(encoder, row).startswith("<|user|>|⏎|" + "@|" * 578 + "hello|<|assistant|>")
    assert (len(ids), row.roles.image, row.roles.user, row.roles.assistant, row.roles.template) == (586, 578, 1, 2, 5)


def test_ids_are_those_of_apply_chat_template(backend: Tokenizer) -> None:
    """M1: the ids equal the template applied to the whole conversation, and the stop token."""
    for template in (released_template(3), literal_template(3)):
        messages = [user(text("hello"), IMAGE), {"role": "assistant", "content": [text("my friend")]}]
        row = encoded(vision_encoder(backend, template), messages)
        tokenizer = vision_tokenizer(backend, template)
        expected = tokenizer.apply_chat_template(messages, return_dict=False)
        assert row.input_ids.tolist() == [*expected, tokenizer.get_vocab()["<|user|>"]]


def test_string_and_parts_give_the_same_ids(backend: Tokenizer) -> None:
    """D4: a string would render as an empty turn in the released template."""
    encoder = vision_encoder(backend)
    as_string = encoded(encoder, [{"role": "user", "content": "hello"}, REPLY])
    as_parts = encoded(encoder, [user(text("hello")), {"role": "assistant", "content": [text("my friend")]}])
    assert marked(encoder, as_string) == "<|user|>|⏎|hello|<|assistant|>|⏎|*my|* friend|*<|user|>"
    assert marked(encoder, as_parts) == marked(encoder, as_string)
    assert as_string.images == ()


def test_a_system_turn_is_left_out_as_the_template_does(backend: Tokenizer) -> None:
    """I2: it costs nothing, and the rest is as without it."""
    encoder = vision_encoder(backend)
    turns = [user(IMAGE), REPLY]
    row = encoded(encoder, [{"role": "system", "content": "hello"}, *turns])
    assert row.input_ids.tolist() == encoded(encoder, turns).input_ids.tolist()
    assert "system" not in encoder.reply_format.rendered_roles


def test_a_long_question_is_shortened_and_the_image_is_not(backend: Tokenizer) -> None:
    """I5: text is taken from the end of the question; the run stays whole."""
    encoder = vision_encoder(backend, max_input_length=12)
    row = encoded(encoder, [user(IMAGE, text("hello" + " there" * 3000)), REPLY])
    assert marked(encoder, row) == (
        "<|user|>|⏎|@|@|@|hello| there| there| there| there|<|assistant|>|⏎|*my|* friend|*<|user|>"
    )
    assert (row.images, row.prompt_tokens_cut) == (("a.png",), 2996)


def test_text_before_the_image_is_shortened_too(backend: Tokenizer) -> None:
    """I5: wherever the text stands."""
    encoder = vision_encoder(backend, max_input_length=9)
    row = encoded(encoder, [user(text("hello there my"), IMAGE, text(" friend")), REPLY])
    assert marked(encoder, row) == "<|user|>|⏎|hello| there|@|@|@|<|assistant|>|⏎|*my|* friend|*<|user|>"


def test_a_row_whose_images_leave_no_room_is_dropped(backend: Tokenizer) -> None:
    """I5: with two images in a budget for one, nothing of the text would be left."""
    encoder = vision_encoder(backend, max_input_length=9, max_images=2)
    dropped = encode(encoder, [user(IMAGE, IMAGE, text("hello")), REPLY])
    assert isinstance(dropped, DroppedRow)
    assert dropped.reason.startswith("the prompt of the first reply takes 11 tokens, 1 of them the user's text")


def test_images_of_turns_that_are_left_out_are_left_out(backend: Tokenizer) -> None:
    """I5: the later turn does not fit, and its image goes with its placeholders."""
    encoder = vision_encoder(backend, max_input_length=9, max_images=2)
    row = encoded(encoder, [user(text("hello")), REPLY, user(IMAGE), REPLY])
    assert marked(encoder, row) == "<|user|>|⏎|hello|<|assistant|>|⏎|*my|* friend|*<|user|>"
    assert (row.images, row.roles.image, row.tail_tokens_cut) == ((), 0, 9)


def _merging_backend() -> Tokenizer:
    # A vocabulary in which backslash and n together are one token, as in the released one.
    tokenizer = Tokenizer(models.BPE({"\\": 0, "n": 1, "\\n": 2, "Ċ": 3}, [("\\", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


@pytest.mark.parametrize(("template", "tokens"), [(literal_template(), 584), (released_template(), 583)])
def test_what_an_image_turn_costs(template: str, tokens: int) -> None:
    """I5: the constant is what the released template renders for one image without text, stop token included."""
    tokenizer = vision_tokenizer(_merging_backend(), template)
    prompt = tokenizer.apply_chat_template([user(IMAGE)], add_generation_prompt=True, return_dict=False)
    assert len([*prompt, tokenizer.get_vocab()["<|user|>"]]) == tokens <= IMAGE_TURN_TOKENS


@pytest.mark.parametrize(("length", "count", "needed"), [(100, 578, 584), (583, 578, 584), (8, 3, 9)])
def test_a_budget_below_one_image_is_refused(backend: Tokenizer, length: int, count: int, needed: int) -> None:
    """I5: with the number that is needed, before any row is read."""
    with pytest.raises(UserError) as caught:
        vision_encoder(backend, count=count, max_input_length=length)
    assert str(caught.value) == (
        f"max_input_length: {length} tokens are too few: a turn with one image and no text takes {needed}\n"
        f"    -> set it to {needed} and the length of the text, or more"
    )


def test_a_budget_of_exactly_one_image_turn_works(backend: Tokenizer) -> None:
    """I5: 584 hold the image and a short question."""
    encoder = vision_encoder(backend, count=578, max_input_length=584)
    assert encoded(encoder, [user(IMAGE, text("hello there")), REPLY]).images == ("a.png",)


def test_another_number_of_vectors_is_refused_with_both_numbers(backend: Tokenizer) -> None:
    """I4: the template and the model's geometry must agree."""
    with pytest.raises(UserError, match=re.escape(
        "MODEL: the chat template renders 3 times <|begin_of_image|> for an image, the model makes 578 vectors"
    )):  # fmt: skip
        vision_encoder(backend, released_template(3), count=578)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            TEMPLATES["glm"],
            "does not render messages whose content is a list of parts\n    -> finetune.py trains chat models",
        ),
        (released_template(0), "renders 0 times <|begin_of_image|> for an image"),
        (
            "{% for m in messages %}{% for part in m.content if part.type == 'image' %}{{ raise_exception('no') }}"
            "{% endfor %}{% endfor %}" + released_template(3),
            "cannot render an image: no",
        ),
    ],
)
def test_templates_without_images_are_refused(backend: Tokenizer, template: str, expected: str) -> None:
    """I4: a chat model in the vision script, before any row is read."""
    with pytest.raises(UserError) as caught:
        vision_encoder(backend, template)
    assert "MODEL: the chat template " + expected in str(caught.value)


def test_an_unknown_placeholder_is_refused(backend: Tokenizer) -> None:
    """I4: config.json and tokenizer of different models."""
    with pytest.raises(UserError, match=r"the tokenizer has no token 59256, which config.json names as boi_token_id"):
        ConversationEncoder(vision_tokenizer(backend, released_template(3)), [], 99, 99, ImageSettings(59256, 3))


def test_a_placeholder_in_the_text_is_no_image(backend: Tokenizer) -> None:
    """I4: refused by place, in whichever role it stands."""
    encoder = vision_encoder(backend)
    turns = [user(text("hello"), text(f"see {PLACEHOLDER}")), {"role": "assistant", "content": PLACEHOLDER}]
    with pytest.raises(UserError) as caught:
        encode(encoder, turns)
    assert [str(problem).split("\n")[0] for problem in caught.value.problems] == [
        "train.jsonl:1: messages[0]: the text holds the image placeholder token <|begin_of_image|>",
        "train.jsonl:1: messages[1]: the text holds the image placeholder token <|begin_of_image|>",
    ]


def test_an_image_that_the_template_leaves_out_is_refused(backend: Tokenizer) -> None:
    """I4: never ignored."""
    template = released_template(3).replace("part.type == 'image'", "part.type == 'image' and messages | length < 3")
    encoder = vision_encoder(backend, template)
    assert encoded(encoder, [user(IMAGE), REPLY]).images == ("a.png",)
    with pytest.raises(UserError, match=r"train.jsonl:1: 1 images take 3 .* the chat template renders 0"):
        encode(encoder, [user(IMAGE), REPLY, user(text("hello")), REPLY])


def test_the_language_part_of_a_vision_checkpoint(backend: Tokenizer) -> None:
    """D4: chat data for a vision checkpoint: its template gets parts, images are refused, no budget is kept for one."""
    encoder = vision_encoder(backend, count=578, max_input_length=9, max_images=0)
    row = encoded(encoder, [{"role": "user", "content": "hello"}, REPLY])
    assert marked(encoder, row) == "<|user|>|⏎|hello|<|assistant|>|⏎|*my|* friend|*<|user|>"
    with pytest.raises(UserError, match=re.escape("messages[0].content[0]: an image part in chat fine-tuning")):
        encode(encoder, [user(IMAGE), REPLY])
    with pytest.raises(UserError, match=r"the text holds the image placeholder token <\|begin_of_image\|>"):
        encode(encoder, [user(text(PLACEHOLDER)), REPLY])


def test_a_long_question_for_the_language_part_is_shortened(backend: Tokenizer) -> None:
    """D4, M2: as in chat fine-tuning."""
    encoder = vision_encoder(backend, max_input_length=7, max_images=0)
    row = encoded(encoder, [{"role": "user", "content": "hello" + " there" * 9}, REPLY])
    assert marked(encoder, row) == "<|user|>|⏎|hello| there| there|<|assistant|>|⏎|*my|* friend|*<|user|>"
