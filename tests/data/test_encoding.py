"""Ids and masks, token by token, on a true tokenizer and several chat templates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from glm_edge_ft.data.conversation import Conversation, parse_conversation
from glm_edge_ft.data.encoding import ConversationEncoder, DroppedRow, EncodedRow
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import UserError
from tests.conftest import TEMPLATES, EncoderMaker, TokenizerMaker

TWO_TURNS = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "my friend"},
    {"role": "user", "content": "how are"},
    {"role": "assistant", "content": "you today"},
]


def conversation_of(encoder: ConversationEncoder, messages: Any, **keys: Any) -> Conversation:
    """Return a conversation from line 1 of train.jsonl."""
    row = RawRow("train.jsonl", 1, 1, {"messages": messages, **keys})
    return parse_conversation(row, encoder.reply_format.rendered_roles)


def encoded(encoder: ConversationEncoder, messages: Any, **keys: Any) -> EncodedRow:
    """Encode messages that give a row."""
    row = encoder.encode(conversation_of(encoder, messages, **keys))
    assert isinstance(row, EncodedRow)
    return row


def marked(row: EncodedRow, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the tokens as text, supervised ones with a star before them."""
    return [
        f"{'*' if supervised else ''}{tokenizer.decode([token])}"
        for token, supervised in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True)
    ]


def test_two_turns_glm(make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker) -> None:
    """M1: supervised is exactly the line break and the text of each reply, and the role token that ends it."""
    row = encoded(make_encoder("glm"), TWO_TURNS)
    assert marked(row, make_tokenizer("glm")) == [
        *["<|user|>", "\n", "hello", " there", "<|assistant|>", "*\n", "*my", "* friend", "*<|user|>", "\n"],
        *["how", " are", "<|assistant|>", "*\n", "*you", "* today", "*<|user|>"],
    ]


def test_two_turns_glm_newline(make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker) -> None:
    """M1: with the line break in the generation prompt, it is not supervised."""
    row = encoded(make_encoder("glm-newline"), TWO_TURNS)
    assert marked(row, make_tokenizer("glm-newline")) == [
        *["<|user|>", "\n", "hello", " there", "<|assistant|>", "\n", "*my", "* friend", "*<|user|>", "\n"],
        *["how", " are", "<|assistant|>", "\n", "*you", "* today", "*<|user|>"],
    ]


def test_two_turns_glm_literal(make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker) -> None:
    """M1: the two characters backslash and n that close a reply belong to it."""
    row = encoded(make_encoder("glm-literal"), TWO_TURNS)
    assert marked(row, make_tokenizer("glm-literal")) == [
        *["<|user|>", "\\", "n", "hello", " there", "\\", "n", "<|assistant|>", "\\", "n"],
        *["*my", "* friend", "*\\", "*n", "*<|user|>", "\\", "n", "how", " are", "\\", "n", "<|assistant|>", "\\", "n"],
        *["*you", "* today", "*\\", "*n", "*<|user|>"],
    ]


def test_two_turns_chatml(make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker) -> None:
    """M1: the closing token is supervised, the line break after it is not, and nothing is appended."""
    row = encoded(make_encoder("chatml"), TWO_TURNS)
    assert "|".join(marked(row, make_tokenizer("chatml"))).replace("\n", "⏎") == (
        "<|im_start|>|user|⏎|hello| there|<|im_end|>|⏎|<|im_start|>|assistant|⏎|*my|* friend|*<|im_end|>|⏎"
        "|<|im_start|>|user|⏎|how| are|<|im_end|>|⏎|<|im_start|>|assistant|⏎|*you|* today|*<|im_end|>|⏎"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_the_template_applied_to_the_whole(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker, template: str
) -> None:
    """M1: as `apply_chat_template` gives them, with the stop token appended where the template has none."""
    tokenizer = make_tokenizer(template)
    whole: Any = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
    stop = [] if template == "chatml" else [tokenizer.get_vocab()["<|user|>"]]
    assert encoded(make_encoder(template), TWO_TURNS).input_ids.tolist() == whole + stop


def test_a_reply_left_out_of_the_loss_keeps_its_ids(make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker) -> None:
    """M1: `"loss": false` changes the mask only."""
    messages = [dict(message) for message in TWO_TURNS]
    messages[1]["loss"] = False  # type: ignore[assignment]
    encoder = make_encoder("glm")
    row, whole = encoded(encoder, messages), encoded(encoder, TWO_TURNS)
    assert row.input_ids.tolist() == whole.input_ids.tolist()
    assert marked(row, make_tokenizer("glm"))[-4:] == ["*\n", "*you", "* today", "*<|user|>"]
    assert row.supervised == 4


def test_only_a_stop_token_ends_a_reply(make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker) -> None:
    """M1: `<|observation|>` stops a reply, `<|assistant|>` and `<|system|>` do not."""
    messages = [
        *[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        *[{"role": "observation", "content": "c"}, {"role": "assistant", "content": "d"}],
        *[{"role": "assistant", "content": "e"}, {"role": "system", "content": "f"}],
        *[{"role": "assistant", "content": "g"}, {"role": "user", "content": "h"}],
    ]
    row = encoded(make_encoder("glm"), messages)
    assert "".join(marked(row, make_tokenizer("glm"))).replace("\n", "⏎") == (
        "<|user|>⏎a<|assistant|>*⏎*b*<|observation|>⏎c<|assistant|>*⏎*d<|assistant|>*⏎*e<|system|>⏎f"
        "<|assistant|>*⏎*g*<|user|>⏎h"
    )


@pytest.mark.parametrize("template", ["glm", "chatml"])
def test_control_tokens_in_the_text_move_nothing(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker, template: str
) -> None:
    """M1: a user who writes the markers of a reply does not get one, and a reply that writes a stop is whole."""
    look_alike = "<|user|>\nx<|assistant|>\ny<|im_end|>\n<|im_start|>assistant\nz<|user|>"
    messages = [{"role": "user", "content": look_alike}, {"role": "assistant", "content": look_alike + "."}]
    tokenizer = make_tokenizer(template)
    row = encoded(make_encoder(template), messages)
    supervised = [token for token, mask in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True) if mask]
    prefix, stop = ("\n", "<|user|>") if template == "glm" else ("", "<|im_end|>")
    assert tokenizer.decode(supervised) == f"{prefix}{look_alike}.{stop}"
    assert row.has_control_text


def test_white_space_at_the_edges_belongs_to_the_reply(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker
) -> None:
    """M1: trimmed offsets would lose it; no token covers both sides of the boundary, as none does in generation."""
    messages = [{"role": "user", "content": "a\n"}, {"role": "assistant", "content": "\n\n b  \n"}]
    row = encoded(make_encoder("glm-newline"), messages)
    assert marked(row, make_tokenizer("glm-newline")) == [
        *["<|user|>", "\n", "a", "\n", "<|assistant|>", "\n", "*\n\n", "* ", "*b", "* ", "* ", "*\n", "*<|user|>"]
    ]


def test_a_marker_that_swallows_white_space_is_not_supervised(backend: Tokenizer) -> None:
    """M1: a special token with `rstrip` covers the reply's first line breaks and is the template's all the same."""
    greedy = Tokenizer.from_str(backend.to_str())
    greedy.add_special_tokens([AddedToken("<|reply|>", special=True, normalized=False, rstrip=True)])
    template = (
        "{% for m in messages %}{{ '<|reply|>' if m.role == 'assistant' else '<|user|>' }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|reply|>\n{% endif %}"
    ).replace("\n{% endif", "{{ '\\n' }}{% endif")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=greedy, eos_token="<|endoftext|>", chat_template=template)
    encoder = ConversationEncoder(tokenizer, [tokenizer.get_vocab()["<|user|>"]], 100, 100)
    row = encoded(encoder, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}])
    assert marked(row, tokenizer) == ["<|user|>", "\n", "a", "<|reply|>", "*b", "*<|user|>"]


def test_a_token_over_the_end_of_a_reply_is_supervised(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker
) -> None:
    """M1: where plain text surrounds a reply, its last token may reach out of it, and its first may not."""
    template = (
        "{% for m in messages %}{{ '\\n' if not loop.first }}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
    )
    row = encoded(make_encoder(template), [*TWO_TURNS[:2], {"role": "user", "content": "x"}])
    text = "".join(marked(row, make_tokenizer(template))).replace("\n", "⏎")
    assert text.endswith("assistant: *my* friend*⏎⏎user: x⏎")


def test_a_user_text_that_begins_with_a_stop_token_ends_no_reply(make_encoder: EncoderMaker) -> None:
    """M1: where the template writes nothing before the user's text, a stop token there is not the template's."""
    template = (
        "{% for m in messages %}{{ '<|assistant|>' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [*TWO_TURNS[:2], {"role": "user", "content": "<|user|>x"}]
    encoder = make_encoder(template)
    row = encoded(encoder, messages)
    assert encoder.tokenizer.backend.decode(row.input_ids[row.loss_mask].tolist(), False) == "my friend"


def test_a_reply_that_the_template_closes_otherwise_is_refused(make_encoder: EncoderMaker) -> None:
    """M1: a closing text that depends on the content leaves no rule for where a reply ends."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\\n{{ m.content }}{{ '\\\\n' if m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\\n{% endif %}"
    )
    encoder = make_encoder(template)
    with pytest.raises(UserError, match=r"train.jsonl:1: the chat template closes messages\[1\] with '', not with"):
        encoder.encode(conversation_of(encoder, [TWO_TURNS[0], {"role": "assistant", "content": ""}]))


def test_tools_and_further_keys_reach_the_template_unchanged(make_encoder: EncoderMaker) -> None:
    """D3: what the template sees is what the file says, different parameters and a real null included."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ m.tools | tojson if m.tools }}{% endfor %}"
        "{{ tools | tojson if tools }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tools = [
        {"name": "f", "parameters": {"x": {"type": "string", "default": None, "format": "2024-01-01"}}},
        {"name": "g", "parameters": {"y": {"enum": [1, 2.5, True]}}},
    ]
    encoder = make_encoder(template)
    for tool in tools:
        messages = [{"role": "system", "content": "s", "tools": [tool]}, *TWO_TURNS[:2]]
        row = encoded(encoder, messages)
        text = encoder.tokenizer.backend.decode(row.input_ids.tolist(), skip_special_tokens=False)
        assert f"<|system|>\ns{json.dumps([tool], ensure_ascii=False)}<|user|>" in text


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_equals_apply_chat_template(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker, template: str
) -> None:
    """D3: the fast path for plain messages and the path for others give what transformers gives."""
    encoder, tokenizer = make_encoder(template), make_tokenizer(template)
    tool_lists: tuple[Any, ...] = (None, [{"name": "f", "default": None}])
    conversations: list[list[dict[str, Any]]] = [
        TWO_TURNS,
        [{"role": "user", "content": "a", "metadata": "b"}, {"role": "assistant", "content": "", "thinking": "c"}],
        [{"role": "user", "content": "a", "x": None, "y": [{"z": None}]}, {"role": "assistant", "content": "\u2028"}],
    ]
    for messages in conversations:
        for tools in tool_lists:
            for prompt in (False, True):
                expected = tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
                assert encoder.template.render(messages, tools, prompt) == expected


def test_role_counts_add_up(make_encoder: EncoderMaker) -> None:
    """D5: each token is text of a role or the template's own."""
    messages = [
        {"role": "system", "content": "you are fine"},
        *TWO_TURNS,
        {"role": "observation", "content": "my friend"},
    ]
    row = encoded(make_encoder("glm"), messages)
    counts = row.roles
    assert (counts.system, counts.user, counts.assistant, counts.other) == (3, 4, 4, 2)
    assert counts.system + counts.user + counts.assistant + counts.other + counts.template == len(row.input_ids)


def test_a_row_with_nothing_to_learn_is_dropped(make_encoder: EncoderMaker) -> None:
    """M2: an empty reply that nothing ends leaves no supervised token."""
    encoder = make_encoder("glm-newline")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "system", "content": "s"},
    ]
    row = encoder.encode(conversation_of(encoder, messages))
    assert row == DroppedRow("train.jsonl", 1, "no token is left to learn: the replies are empty")


def test_what_the_template_refuses_is_named_by_place(make_encoder: EncoderMaker) -> None:
    """D2: a template may insist on an order of roles."""
    template = (
        TEMPLATES["glm"] + "{% if messages[0].role == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"
    )
    encoder = make_encoder(template)
    with pytest.raises(UserError, match=r"train.jsonl:1: the chat template refuses this conversation: user first"):
        encoder.encode(conversation_of(encoder, [{"role": "assistant", "content": "b"}, *TWO_TURNS]))


def test_a_row_that_breaks_the_prefix_is_refused_by_place(make_encoder: EncoderMaker) -> None:
    """M1: a template that rewrites earlier replies by their content is found out on the row."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{{ m.content if loop.last or m.role == 'user' else m.content.split('#')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    encoder = make_encoder(template)
    assert encoded(encoder, TWO_TURNS).supervised == 6
    with pytest.raises(UserError) as caught:
        encoder.encode(
            conversation_of(encoder, [TWO_TURNS[0], {"role": "assistant", "content": "x#y"}, *TWO_TURNS[2:]])
        )
    assert "train.jsonl:1: the chat template is not prefix-consistent at messages[1]" in str(caught.value)
    assert "goes on with 'x#y', the longer one with 'y<|user|>" in str(caught.value)
