"""The checkpoint's own chat template: rendering, and what it tells about where a reply begins, ends and stops.

Nothing here knows a model. `probe_reply_format` renders a few sentinel messages and reads the format off the result, so
that it holds for any template whose turns are prefixes of the whole conversation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from jinja2 import Template
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from glm_edge_ft.data.conversation import ROLES_IF_RENDERED
from glm_edge_ft.data.token_places import TokenizedText, by_lengths, by_offsets, byte_lengths_of
from glm_edge_ft.errors import UserError

NOT_PREFIX_FIX = (
    "its turns change when later turns follow, so no mask is right for all of them; "
    "use a checkpoint or a chat_template.jinja that renders each turn the same way at any place"
)
_PLAIN_FIX = "use a checkpoint whose chat template works for plain conversations"
_REASONING_KEYS = frozenset({"reasoning_content", "thinking", "reasoning"})  # transformers fills in their aliases
_USER, _REPLY, _NEXT, _LAST, _OTHER = "Kestrel", "Marigold", "Periwinkle", "Tamarind", "Juniper"
_SHOWN = 40

Messages = Sequence[Mapping[str, Any]]


class TemplateRefusal(Exception):  # not an error of the program: the template said no
    """The chat template cannot render these messages; the text says why."""


class ChatTemplate:
    """The tokenizer's chat template, rendered exactly as `tokenizer.apply_chat_template(..., tokenize=False)` does.

    It is several times faster for plain messages, which need none of the copies that transformers makes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, content_form: Literal["string", "parts"] = "string") -> None:
        """Read the template; `content_form` is how it gets the content of messages, parts for vision checkpoints.

        Raises:
            UserError: the tokenizer has no template, or it does not render that form.
        """
        try:
            self.source: str = tokenizer.get_chat_template()
            self.source_with_tools: str = tokenizer.get_chat_template(tools=[])
        except ValueError:
            fix = "use a chat model, or add chat_template.jinja to its folder"
            raise UserError.single("MODEL", "the tokenizer has no chat template", fix) from None
        self.special_tokens: dict[str, str] = dict(tokenizer.special_tokens_map)
        self.content_as_parts = content_form == "parts"
        text = self.try_render([_turn("user", _USER), _turn("assistant", _REPLY)])
        # A template for strings writes a list out as Python does. Where a template raises, the probe shows what.
        is_python = self.content_as_parts and text is not None and ("'type'" in text or '"type"' in text)
        if text is not None and (is_python or _USER not in text or _REPLY not in text):
            form = "a list of parts" if self.content_as_parts else "a string"
            what = f"does not render messages whose content is {form}"
            raise _bad_template(what, "finetune.py trains chat models, finetune_vision.py vision models")

    def render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of the messages; contents may be strings in either form. Raises TemplateRefusal."""
        if self.content_as_parts:
            messages = [_with_parts(message) for message in messages]
        try:
            if tools is None and all(map(_is_plain, messages)):
                variables: dict[str, Any] = {
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    **self.special_tokens,
                }
                variables["add_generation_prompt"] = add_generation_prompt
                return _render_plain(self.source, variables)
            render: Any = render_jinja_template  # its annotations do not say what it returns
            rendered, _ = render(
                # Null values are left out, as by apply_chat_template.
                conversations=[[{key: one for key, one in m.items() if one is not None} for m in messages]],
                tools=None if tools is None else list(tools),
                chat_template=self.source if tools is None else self.source_with_tools,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
            return str(rendered[0])
        except Exception as error:  # a template is foreign code and may raise anything
            raise TemplateRefusal(str(error) or type(error).__name__) from error

    def try_render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str | None:
        """Return what `render` returns, or None if the template raises."""
        try:
            return self.render(messages, tools)
        except TemplateRefusal:
            return None


@functools.lru_cache
def _compiled(source: str) -> tuple[Template, dict[str, Any]]:
    template = _compile_jinja_template(source)
    return template, dict(template.globals)


def _render_plain(source: str, variables: Mapping[str, Any]) -> str:
    # What `Template.render` does; that one looks through the chain of global names anew for each rendering, which takes
    # longer than the rendering of a short conversation.
    template, names = _compiled(source)
    environment = template.environment
    context = environment.context_class(
        environment, {**names, **variables}, template.name, template.blocks, globals=names
    )
    return "".join(template.root_render_func(context))


def _is_plain(message: Mapping[str, Any]) -> bool:
    for key, value in message.items():
        if (type(value) is not str and (key != "content" or type(value) is not list)) or key in _REASONING_KEYS:
            return False
    return True


def _with_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if type(content) is str else message


class OffsetTokenizer:
    """The tokenizer's backend with exact offsets of each token in the text, and the same ids.

    The byte-level post-processor of many checkpoints trims white space off the offsets; a copy without it does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Copy the backend. Raises UserError for a slow tokenizer or one whose copy gives other ids."""
        name = type(tokenizer).__name__
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            what = f"the tokenizer {name} is a slow one: it cannot say which text a token covers"
            raise UserError.single("MODEL", what, "use a checkpoint that holds a tokenizer.json")
        backend = tokenizer.backend_tokenizer
        self.backend: Tokenizer = Tokenizer.from_str(backend.to_str())
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = backend.encode_special_tokens
        self._byte_lengths = byte_lengths_of(self.backend)
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(special)
        self.special_texts = tuple(text for text in special.values() if text)
        sample = f" {_USER}\n\n {_REPLY} \u4f60\u597d\u3002\U0001f642 {''.join(self.special_texts)} \n"
        if self.encode(sample).ids != tokenizer(sample, add_special_tokens=False)["input_ids"]:
            raise UserError.single("MODEL", f"the tokenizer {name} does not give the ids of its own tokenizer.json")

    def encode(self, text: str) -> Encoding:
        """Return ids and offsets of one text, without any token added."""
        return self.backend.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Return ids and offsets of each text, without any token added."""
        if self._byte_lengths is None:
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
            return [by_offsets(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            by_lengths(text, encoding.ids, self._byte_lengths) or by_offsets(text, self.encode(text))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def encode_pieces(self, text: str, cuts: Sequence[int]) -> TokenizedText | None:
        """Return the tokens of a text so that none reaches over one of the characters `cuts`, which ascend.

        None for a tokenizer that puts something before the text of each piece, such as a space.
        """
        encodings = [self.encode(text[start:end]) for start, end in pairwise((0, *cuts, len(text)))]
        ids = [token_id for encoding in encodings for token_id in encoding.ids]
        if self.decode(ids) != self.decode(self.encode(text).ids):
            return None
        offsets = [
            (start + shift, end + shift)
            for encoding, shift in zip(encodings, (0, *cuts), strict=True)
            for start, end in encoding.offsets
        ]
        return TokenizedText(ids, [start for start, _ in offsets], [end for _, end in offsets], text, False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, control tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True)
class ReplyFormat:
    """What a chat template does around a reply."""

    prefix: str  # after the generation prompt and before the content, such as a line break: the model has to write it
    closing: str  # written after the content
    closing_supervised: int  # characters of `closing` that bear loss: up to and with its stop token, or all of it
    closing_stops: bool  # whether `closing` holds a stop token
    stop_id: int  # the token that ends a reply
    stop_ids: frozenset[int]  # every token that ends generation
    rendered_roles: frozenset[str]  # the roles whose content the template renders
    headers: Mapping[str, str]  # text before the content of a message of each role, where it follows a reply


def probe_reply_format(
    template: ChatTemplate, tokenizer: OffsetTokenizer, stop_ids: frozenset[int], eos_token_id: int | None
) -> ReplyFormat:
    """Read the reply format off the template.

    `stop_ids` are the tokens that end generation for this checkpoint; `eos_token_id` ends a reply where the template
    renders none of them. Raises UserError where the turns are not prefixes of the whole, or nothing stops a reply.
    """
    turns = [_turn("user", _USER), _turn("assistant", _REPLY), _turn("user", _NEXT), _turn("assistant", _LAST)]
    try:
        whole = template.render(turns)
        prompt = template.render(turns[:1], add_generation_prompt=True)
        reply = template.render(turns[:2])
        later = [template.render(turns[:3]), template.render(turns[:3], add_generation_prompt=True)]
    except TemplateRefusal as refusal:
        raise _bad_template(f"cannot render a user and an assistant turn: {refusal}", _PLAIN_FIX) from None
    for part, text in ((prompt, reply), *((part, whole) for part in (prompt, reply, *later))):
        if not text.startswith(part):
            raise _bad_template(f"is not prefix-consistent: {difference(part, text)}", NOT_PREFIX_FIX)
    start = reply.index(_REPLY, len(prompt))
    prefix, closing = reply[len(prompt) : start], reply[start + len(_REPLY) :]
    stop_ids |= frozenset() if eos_token_id is None else {eos_token_id}
    headers = _headers(template, tokenizer, turns[:2], reply)
    closing_ids = tokenizer.encode(closing)
    # The first stop token in the closing text, and the character after it.
    stop = next(
        (
            (token, end)
            for token, (_, end) in zip(closing_ids.ids, closing_ids.offsets, strict=True)
            if token in stop_ids
        ),
        None,
    )
    stop_id = eos_token_id if stop is None else stop[0]
    if stop is None and not stop_ids.isdisjoint(first := tokenizer.encode(headers["user"]).ids[:1]):
        stop_id = first[0]
    if stop_id is None:
        raise _bad_template("ends a reply with no stop token, and the tokenizer has no eos token", "set eos_token")
    renders_system = _OTHER in (template.try_render([_turn("system", _OTHER), *turns[:2]]) or "")
    return ReplyFormat(
        prefix=prefix,
        closing=closing,
        closing_supervised=len(closing) if stop is None else stop[1],
        closing_stops=stop is not None,
        stop_id=stop_id,
        stop_ids=stop_ids,
        rendered_roles=frozenset(headers) | {"assistant"} | ({"system"} if renders_system else set()),
        headers=headers,
    )


def _headers(template: ChatTemplate, tokenizer: OffsetTokenizer, turns: Messages, reply: str) -> dict[str, str]:
    """Return what is written before the content of a user message, and of each further role with a text of its own."""
    found: dict[str, str] = {}
    for role in ("user", "assistant", *ROLES_IF_RENDERED):
        text = template.try_render([*turns, _turn(role, _OTHER)]) or ""
        found[role] = text[len(reply) : text.index(_OTHER)] if text.startswith(reply) and _OTHER in text else ""

    def is_marked(header: str) -> bool:
        return not tokenizer.special_ids.isdisjoint(tokenizer.encode(header).ids)

    def is_own(header: str) -> bool:
        # A template that writes any role's name between its markers renders roles that have no token of their own.
        return header not in ("", found["user"], found["assistant"]) and (
            is_marked(header) or not is_marked(found["user"])
        )

    return {"user": found["user"]} | {role: found[role] for role in ROLES_IF_RENDERED if is_own(found[role])}


def difference(part: str, whole: str) -> str:
    """Return a sentence that shows where `part` and the beginning of `whole` are no longer the same."""
    pairs = enumerate(zip(part, whole, strict=False))
    position = next((index for index, (a, b) in pairs if a != b), min(len(part), len(whole)))
    before = part[max(0, position - _SHOWN) : position]
    return (
        f"after {before!r} the shorter rendering goes on with {part[position : position + _SHOWN]!r}, "
        f"the longer one with {whole[position : position + _SHOWN]!r}"
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _bad_template(what: str, fix: str) -> UserError:
    return UserError.single("MODEL", f"the chat template {what}", fix)
