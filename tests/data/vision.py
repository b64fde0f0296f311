"""Shared parts of the tests of images: templates as GLM-Edge-V has them, encoders with few placeholders, rows."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.data.placeholders import ImageSettings

PLACEHOLDER = "<|begin_of_image|>"
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
IMAGE = {"type": "image", "image": "a.png"}
REPLY = {"role": "assistant", "content": "my friend"}


def text(content: str) -> dict[str, str]:
    """Return a text part."""
    return {"type": "text", "text": content}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    """Return a user message of parts."""
    return {"role": "user", "content": list(parts)}


def released_template(count: int = 578, newline: str = "\n", closing: str = "") -> str:
    """Return a template that renders as the released one: system turns left out, content as a list of parts.

    With real line breaks nothing follows a content; `literal_template` has a backslash and an n after each.
    """
    newline, closing = newline.replace("\\", "\\\\").replace("\n", "\\n"), closing.replace("\\", "\\\\")
    return (
        f'{{% set br = "{newline}" %}}{{% set closing = "{closing}" %}}'
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ br }}{% for part in m.content %}"
        "{% if part.type == 'image' %}{% for _ in range(" + str(count) + ") %}<|begin_of_image|>{% endfor %}"
        "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ closing }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ br }}{% endif %}"
    )


def literal_template(count: int = 578) -> str:
    """Return the variant with the two characters backslash and n."""
    return released_template(count, "\\n", "\\n")


def vision_tokenizer(backend: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=template
    )


def vision_encoder(
    backend: Tokenizer,
    template: str | None = None,
    *,
    count: int = 3,
    max_input_length: int = 4096,
    max_output_length: int = 4096,
    max_images: int = 1,
) -> ConversationEncoder:
    """Return an encoder for images of `count` placeholders each."""
    tokenizer = vision_tokenizer(backend, released_template(count) if template is None else template)
    stop_ids = [tokenizer.get_vocab()[token] for token in STOP_TOKENS]
    settings = ImageSettings(tokenizer.get_vocab()[PLACEHOLDER], count, max_images)
    return ConversationEncoder(tokenizer, stop_ids, max_input_length, max_output_length, settings)
