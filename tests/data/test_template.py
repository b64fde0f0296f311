"""What the probe reads off a chat template, and which templates and tokenizers are refused."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.errors import UserError
from tests.conftest import TEMPLATES, EncoderMaker, TokenizerMaker

ANY_ROLE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    ("template", "prefix", "closing", "supervised", "stops", "stop"),
    [
        ("glm", "\n", "", 0, False, "<|user|>"),
        ("glm-newline", "", "", 0, False, "<|user|>"),
        ("glm-literal", "", "\\n", 2, False, "<|user|>"),
        ("chatml", "", "<|im_end|>\n", 10, True, "<|im_end|>"),
    ],
)
def test_the_reply_format_is_read_off_the_template(
    make_encoder: EncoderMaker,
    make_tokenizer: TokenizerMaker,
    *,
    template: str,
    prefix: str,
    closing: str,
    supervised: int,
    stops: bool,
    stop: str,
) -> None:
    """M1: what surrounds a reply and what ends it, for each template."""
    found = make_encoder(template).reply_format
    assert (found.prefix, found.closing, found.closing_supervised, found.closing_stops) == (
        prefix,
        closing,
        supervised,
        stops,
    )
    assert make_tokenizer(template).convert_ids_to_tokens(found.stop_id) == stop


def test_without_a_stop_token_after_the_reply_the_eos_token_ends_it(make_tokenizer: TokenizerMaker) -> None:
    """M1: a template that separates turns by plain text."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = make_tokenizer(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    found = ConversationEncoder(tokenizer, [], 10, 10).reply_format
    assert (found.prefix, found.closing, found.stop_id) == ("", "\n", tokenizer.eos_token_id)
    assert found.stop_ids == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        ("glm", {"system", "user", "assistant", "observation"}),
        ("chatml", {"system", "user", "assistant", "observation", "tool"}),
        # The vocabulary has `<|observation|>` and no `<|tool|>`, so that would be plain text.
        (ANY_ROLE + PROMPT, {"system", "user", "assistant", "observation"}),
        (ANY_ROLE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}") + PROMPT,
         {"user", "assistant", "observation"}),
        # Everything that is no user is written as a reply: no role of its own.
        ("{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}{% endfor %}"
         + PROMPT, {"system", "user", "assistant"}),
        (TEMPLATES["glm"] + "{% for m in messages %}{% if m.role in ['system', 'observation'] %}"
         "{{ raise_exception('no') }}{% endif %}{% endfor %}", {"user", "assistant"}),
    ],
)  # fmt: skip
def test_rendered_roles(make_encoder: EncoderMaker, template: str, roles: set[str]) -> None:
    """D2: system, user and assistant, and others only where the template gives them a form of their own."""
    assert make_encoder(template).reply_format.rendered_roles == roles


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # A block that only the last reply gets, as templates of reasoning models have it.
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ '<think></think>' if loop.last and m.role == 'assistant' }}"
            "{{ m.content }}{% endfor %}" + PROMPT,
            "is not prefix-consistent: after "
            "'<|user|>\\nKestrel<|assistant|>\\n' the shorter rendering goes on with '<think></think>Marigold', "
            "the longer one with 'Marigold<|user|>",
        ),
        (
            ANY_ROLE + "{% if add_generation_prompt %}<|assistant|>\nSure: {% endif %}",
            "is not prefix-consistent: after ",
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content if part.type == 'text' %}{{ part.text }}"
            "{% endfor %}{% endfor %}" + PROMPT,
            "does not render messages whose content is a string\n    -> finetune.py trains chat models",
        ),
        ("{{ raise_exception('never') }}", "cannot render a user and an assistant turn: never"),
        ("{{ messages[0]['x'].y }}", "cannot render a user and an assistant turn: "),
    ],
)
def test_templates_without_a_right_mask_are_refused(make_encoder: EncoderMaker, template: str, expected: str) -> None:
    """M1: refused before any row is read, with the place where two renderings part."""
    with pytest.raises(UserError) as caught:
        make_encoder(template)
    assert "MODEL: the chat template " + expected in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused(backend: Tokenizer) -> None:
    """M1: a base model is no chat model."""
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        ConversationEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), [], 10, 10)


def test_a_reply_that_nothing_ends_is_refused(backend: Tokenizer) -> None:
    """M1: no stop token is rendered, and there is no eos token either."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATES["glm"])
    with pytest.raises(UserError, match="ends a reply with no stop token, and the tokenizer has no eos token"):
        ConversationEncoder(tokenizer, [], 10, 10)


class _SlowTokenizer(PreTrainedTokenizerBase):
    """A tokenizer without a tokenizer.json behind it."""

    is_fast = False


def test_a_slow_tokenizer_is_refused() -> None:
    """M1: without character offsets there is no mask."""
    tokenizer = _SlowTokenizer(chat_template=TEMPLATES["glm"])
    with pytest.raises(UserError, match="the tokenizer _SlowTokenizer is a slow one"):
        ConversationEncoder(tokenizer, [], 10, 10)
