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
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from glm_edge_ft.data.conversation import ROLES_IF_RENDERED
from glm_edge_ft.data.token_places import TokenizedText, by_lengths, by_offsets, byte_lengths_of
from glm_edge_ft.errors import UserError

_REASONING_KEYS = frozenset({"reasoning_content", "thinking", "reasoning"})  # transformers fills in their aliases
_USER, _REPLY, _NEXT, _LAST, _OTHER = "Kestrel", "Marigold", "Periwinkle", "Tamarind", "Juniper"
_SHOWN = 40
_FORMS = {
    "string": ("a string", "is it a vision model? Then use finetune_vision.py"),
    "parts": ("a list of parts", "is it a chat model? Then use finetune.py"),
}

Messages = Sequence[Mapping[str, Any]]


class TemplateRefusal(Exception):  # not an error of the program: the template said no
    """The chat template cannot render these messages; the text says why."""


class ChatTemplate:
    """The tokenizer's chat template, rendered exactly as `tokenizer.apply_chat_template(..., tokenize=False)` does.

    It is several times faster for plain messages, which need none of the copies that transformers makes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, content_form: Literal["string", "parts"] = "string") -> None:
        """Read the template.

        Args:
            tokenizer: has the template.
            content_form: how the template gets the content of messages: as a string or as a list of parts.

        Raises:
            UserError: the tokenizer has no template, or it does not render that form.
        """
        try:
            self.source: str = tokenizer.get_chat_template()
            self.source_with_tools: str = tokenizer.get_chat_template(tools=[])
        except ValueError:
            raise UserError.single(
                "MODEL",
                "the tokenizer has no chat template",
                "use a chat model, or add chat_template.jinja to its folder",
            ) from None
        self.special_tokens: dict[str, str] = dict(tokenizer.special_tokens_map)
        self.content_as_parts = content_form == "parts"
        if not self._renders_content():
            form, hint = _FORMS[content_form]
            raise _bad_template(f"does not render messages whose content is {form}", hint)

    def _renders_content(self) -> bool:
        # A template for strings writes a list out as Python does, quotes and all. What a template raises is left to the
        # probe of the reply format, which shows it.
        try:
            text = self.render([_turn("user", _USER), _turn("assistant", _REPLY)])
        except TemplateRefusal:
            return True
        is_python = self.content_as_parts and ("'type'" in text or '"type"' in text)
        return _USER in text and _REPLY in text and not is_python

    def render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of the messages; contents may be strings in either form.

        Raises TemplateRefusal if the template raises.
        """
        if self.content_as_parts:
            messages = [_with_parts(message) for message in messages]
        try:
            if tools is None and all(map(_is_plain, messages)):
                variables = {
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self.special_tokens,
                }
                return _render_plain(self.source, variables)
            render: Any = render_jinja_template  # its annotations do not say what it returns
            rendered, _ = render(
                conversations=[[_without_nulls(message) for message in messages]],
                tools=None if tools is None else list(tools),
                chat_template=self.source if tools is None else self.source_with_tools,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
            return str(rendered[0])
        except Exception as error:  # a template is foreign code and may raise anything
            raise TemplateRefusal(str(error) or type(error).__name__) from error


@functools.lru_cache
def _compiled(source: str) -> tuple[Template, dict[str, Any]]:
    # The template and the names that every rendering has, in a plain dictionary.
    template = _compile_jinja_template(source)
    return template, dict(template.globals)


def _render_plain(source: str, variables: Mapping[str, Any]) -> str:
    # What `Template.render` does; that one looks through the chain of global names anew for each rendering, which takes
    # longer than the rendering of a short conversation.
    template, names = _compiled(source)
    environment = template.environment
    parent = {**names, **variables}
    context = environment.context_class(environment, parent, template.name, template.blocks, globals=names)
    return "".join(template.root_render_func(context))


def _is_plain(message: Mapping[str, Any]) -> bool:
    for key, value in message.items():
        if (type(value) is not str and (key != "content" or type(value) is not list)) or key in _REASONING_KEYS:
            return False
    return True


def _with_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if type(content) is str else message


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    # As apply_chat_template does, so that training sees what serving will render.
    return {key: value for key, value in message.items() if value is not None}


class OffsetTokenizer:
    """The tokenizer's backend with exact places in the text for each token, and the same ids.

    The byte-level post-processor of many checkpoints trims white space off the offsets; a copy without it does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Copy the backend. Raises UserError for a slow tokenizer or one whose copy gives other ids."""
        backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        if backend is None:
            raise UserError.single(
                "MODEL",
                f"the tokenizer {type(tokenizer).__name__} is a slow one: it cannot say which text a token covers",
                "use a checkpoint that holds a tokenizer.json",
            )
        self.backend: Tokenizer = Tokenizer.from_str(backend.to_str())
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = backend.encode_special_tokens
        self._byte_lengths = byte_lengths_of(self.backend)
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self.special_texts = tuple(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content
        )
        sample = f" {_USER}\n\n {_REPLY} \u4f60\u597d\u3002\U0001f642 {''.join(self.special_texts)} \n"
        if self.encode(sample).ids != tokenizer(sample, add_special_tokens=False)["input_ids"]:
            raise UserError.single(
                "MODEL", f"the tokenizer {type(tokenizer).__name__} does not give the ids of its own tokenizer.json"
            )

    def encode(self, text: str) -> Encoding:
        """Return ids and offsets of one text, without any token added."""
        return self.backend.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Return ids and places of each text, without any token added."""
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
        places = [
            (start + shift, end + shift)
            for encoding, shift in zip(encodings, (0, *cuts), strict=True)
            for start, end in encoding.offsets
        ]
        return TokenizedText(ids, [start for start, _ in places], [end for _, end in places], text, False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, control tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True)
class ReplyFormat:
    r"""What a chat template does around a reply.

    Attributes:
        prefix: text after the generation prompt and before the content, which the model has to write itself
            (`"\n"` where the template has a line break after the role but not after the generation prompt).
        closing: text that the template writes after the content.
        closing_supervised: how many characters of `closing` bear loss: up to and with its stop token, or all of it.
        closing_stops: whether `closing` holds a stop token.
        stop_id: the token that ends a reply.
        stop_ids: every token that ends generation.
        rendered_roles: the roles whose content the template renders.
        headers: text before the content of a message of each role, where it follows a reply.
    """

    prefix: str
    closing: str
    closing_supervised: int
    closing_stops: bool
    stop_id: int
    stop_ids: frozenset[int]
    rendered_roles: frozenset[str]
    headers: Mapping[str, str]


def probe_reply_format(
    template: ChatTemplate, tokenizer: OffsetTokenizer, stop_ids: frozenset[int], eos_token_id: int | None
) -> ReplyFormat:
    """Read the reply format off the template.

    Args:
        template: the chat template.
        tokenizer: gives the ids of the rendered texts.
        stop_ids: every token that ends generation for this checkpoint.
        eos_token_id: ends a reply where the template renders no stop token.

    Raises:
        UserError: no plain text is rendered, the turns are not prefixes of the whole, or nothing stops a reply.
    """
    turns = [_turn("user", _USER), _turn("assistant", _REPLY), _turn("user", _NEXT), _turn("assistant", _LAST)]
    try:
        whole = template.render(turns)
        prompt = template.render(turns[:1], add_generation_prompt=True)
        reply = template.render(turns[:2])
        following = template.render(turns[:3])
        later = [template.render(turns[:3], add_generation_prompt=True)]
    except TemplateRefusal as refusal:
        raise _bad_template(f"cannot render a user and an assistant turn: {refusal}") from None
    check_prefix(prompt, reply, "the prompt of a reply, of the conversation up to that reply")
    for part in (prompt, reply, following, *later):
        check_prefix(part, whole, "the first turns, of the whole conversation")
    start = reply.index(_REPLY, len(prompt))
    prefix, closing = reply[len(prompt) : start], reply[start + len(_REPLY) :]
    stop_ids |= frozenset() if eos_token_id is None else {eos_token_id}
    closing_stop = _first_stop(tokenizer.encode(closing), stop_ids)
    next_header = following[len(reply) : following.index(_NEXT, len(reply))]
    headers = {"user": next_header, **_other_headers(template, turns[:2], reply)}
    headers = {role: text for role, text in headers.items() if role == "user" or _is_own(text, next_header, tokenizer)}
    renders_system = _renders(template, [_turn("system", _OTHER), *turns[:2]])
    if closing_stop is not None:
        stop_id, closing_supervised = closing_stop
    else:
        first = tokenizer.encode(next_header).ids[:1]
        stop_id = first[0] if first and first[0] in stop_ids else _eos(eos_token_id)
        closing_supervised = len(closing)
    return ReplyFormat(
        prefix=prefix,
        closing=closing,
        closing_supervised=closing_supervised,
        closing_stops=closing_stop is not None,
        stop_id=stop_id,
        stop_ids=stop_ids,
        rendered_roles=frozenset(headers) | {"assistant"} | ({"system"} if renders_system else set()),
        headers=headers,
    )


def check_prefix(part: str, whole: str, what: str) -> None:
    """Check that `part` begins `whole`. Raises UserError that shows where they differ."""
    if not whole.startswith(part):
        raise _bad_template(f"is not prefix-consistent ({what}): {difference(part, whole)}", NOT_PREFIX_FIX)


NOT_PREFIX_FIX = (
    "its turns change when later turns follow, so no mask is right for all of them; "
    "use a checkpoint or a chat_template.jinja that renders each turn the same way at any place"
)


def difference(part: str, whole: str) -> str:
    """Return a sentence that shows where `part` and the beginning of `whole` are no longer the same."""
    position = next(
        (i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole))
    )
    before = part[max(0, position - _SHOWN) : position]
    return (
        f"after {before!r} the shorter rendering goes on with {part[position : position + _SHOWN]!r}, "
        f"the longer one with {whole[position : position + _SHOWN]!r}"
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _bad_template(
    what: str, fix: str = "use a checkpoint whose chat template works for plain conversations"
) -> UserError:
    return UserError.single("MODEL", f"the chat template {what}", fix)


def _eos(eos_token_id: int | None) -> int:
    if eos_token_id is None:
        raise _bad_template("ends a reply with no stop token, and the tokenizer has no eos token", "set eos_token")
    return eos_token_id


def _first_stop(encoding: Encoding, stop_ids: frozenset[int]) -> tuple[int, int] | None:
    # The first stop token and the index of the character after it.
    for token_id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token_id in stop_ids:
            return token_id, end
    return None


def _other_headers(template: ChatTemplate, turns: list[dict[str, str]], reply: str) -> dict[str, str]:
    headers: dict[str, str] = {}
    assistant_header = _header(template, turns, reply, "assistant")
    for role in ROLES_IF_RENDERED:
        text = _header(template, turns, reply, role)
        if text is not None and text != assistant_header:
            headers[role] = text
    return headers


def _is_own(header: str, user_header: str, tokenizer: OffsetTokenizer) -> bool:
    # A template that writes any role's name between its markers renders roles that the vocabulary has no token for.
    user_is_marked = not tokenizer.special_ids.isdisjoint(tokenizer.encode(user_header).ids)
    is_marked = not tokenizer.special_ids.isdisjoint(tokenizer.encode(header).ids)
    return header not in ("", user_header) and (is_marked or not user_is_marked)


def _header(template: ChatTemplate, turns: list[dict[str, str]], reply: str, role: str) -> str | None:
    # None where the template raises for the role or leaves its messages out.
    try:
        text = template.render([*turns, _turn(role, _OTHER)])
    except TemplateRefusal:
        return None
    return text[len(reply) : text.index(_OTHER)] if text.startswith(reply) and _OTHER in text else None


def _renders(template: ChatTemplate, messages: Messages) -> bool:
    try:
        return _OTHER in template.render(messages)
    except TemplateRefusal:
        return False
