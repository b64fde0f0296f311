r"""Conversation → token ids and loss mask, by the checkpoint's own chat template, whole conversation at once.

The text of the whole conversation is rendered and tokenized once. For each assistant turn two more renderings say where
it begins (the messages before it, with the generation prompt) and where it ends (the messages up to it); both must be
prefixes of the whole. A token is supervised if it covers a character of a supervised reply or is the stop token that
ends it. Only characters are counted, so text that looks like a control token moves nothing.

    <|user|> ⏎ Hi <|assistant|> ⏎ Hello <|user|> ⏎ Bye <|assistant|> ⏎ See you <|user|>
                                ^^^^^^^^^^^^^^^^                     ^^^^^^^^^^^^^^^^^^    supervised

(The last `<|user|>` is appended: the template renders nothing there, but the model must learn to stop.) Where a token
would cover both the end of the generation prompt and the beginning of a supervised reply, as of a reply that begins
with a line break, the text is tokenized in two pieces: generation starts from the tokens of the prompt alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from glm_edge_ft.data.budget import Budgets, ReplySpan, TooLong, plan_row
from glm_edge_ft.data.conversation import Conversation, parse_conversation
from glm_edge_ft.data.parts import listed_keys
from glm_edge_ft.data.placeholders import ImageSettings, PlaceholderCounter
from glm_edge_ft.data.rendering import as_template_expects, unrendered_keys
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.data.template import (
    NOT_PREFIX_FIX,
    ChatTemplate,
    OffsetTokenizer,
    TemplateRefusal,
    difference,
    probe_reply_format,
)
from glm_edge_ft.data.token_places import TokenizedText
from glm_edge_ft.errors import Problem, UserError

T = TypeVar("T")


class RoleTokens(NamedTuple):
    """How many tokens of a row are text of each role.

    `image` are the placeholders of images; `template` is everything else that the template wrote itself.
    """

    system: int
    user: int
    assistant: int
    other: int
    template: int
    image: int


@dataclass(frozen=True)
class EncodedRow:
    """One conversation as the model gets it."""

    input_ids: NDArray[np.int32]  # (length,)
    loss_mask: NDArray[np.bool_]  # (length,), True where the token bears loss
    file: str  # name of the data file
    line: int  # 1-based line in it
    prompt_tokens_cut: int  # from the end of the user's text, because the first prompt was too long
    reply_tokens_cut: int  # from the end of a reply that was too long
    tail_tokens_cut: int  # of whole turns left out at the end
    roles: RoleTokens
    has_control_text: bool  # whether a message holds text that the tokenizer turns into a control token
    images: tuple[str, ...] = ()  # paths as written of the images whose placeholders are in `input_ids`, in their order
    notes: tuple[str, ...] = ()  # remarks on keys that the template does not render

    @property
    def supervised(self) -> int:
        """Number of tokens that bear loss."""
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True)
class DroppedRow:
    """A row that is left out, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Located:
    """A tokenized conversation with its replies located in it; `ids` may end with a stop token beyond the text."""

    ids: list[int]
    tokens: TokenizedText
    replies: list[ReplySpan]


class ConversationEncoder:
    """Encodes conversations for one tokenizer, one set of stop tokens and one pair of budgets."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        max_input_length: int,
        max_output_length: int,
        images: ImageSettings | None = None,
    ) -> None:
        """Probe the template.

        Args:
            tokenizer: a fast tokenizer with a chat template.
            stop_ids: the checkpoint's stop tokens (generation_config's and config's eos_token_id).
            max_input_length: most tokens of a prompt.
            max_output_length: most tokens of a reply, its stop token included.
            images: for vision checkpoints: their template gets every content as a list of parts.

        Raises:
            UserError: the tokenizer or its template cannot be used, or `max_input_length` is too small for an image.
        """
        self.images = images
        self.template = ChatTemplate(tokenizer, "string" if images is None else "parts")
        self.tokenizer = OffsetTokenizer(tokenizer)
        eos = tokenizer.eos_token_id
        self.reply_format = probe_reply_format(self.template, self.tokenizer, frozenset(stop_ids), eos)
        self.budgets = Budgets(max_input_length, max_output_length)
        self.placeholders: PlaceholderCounter | None = None
        if images is not None:
            self.placeholders = PlaceholderCounter(images, self.template, self.tokenizer, max_input_length)
        self._control_text = re.compile("|".join(map(re.escape, self.tokenizer.special_texts)) or "(?!)")

    @property
    def takes_images(self) -> bool:
        """Whether rows may have images: in vision fine-tuning, not where a vision checkpoint gets chat data."""
        return self.images is not None and self.images.max_images > 0

    def parse(self, row: RawRow) -> Conversation:
        """Check a raw row and return its conversation. Raises UserError with every error of the row."""
        max_images = self.images.max_images if self.images is not None and self.takes_images else None
        conversation = parse_conversation(row, self.reply_format.rendered_roles, max_images)
        conversation = as_template_expects(conversation, self.template)
        if self.placeholders is not None:
            self.placeholders.check_text(conversation)
        return conversation

    def encode(self, conversation: Conversation) -> EncodedRow | DroppedRow:
        """Encode one conversation. Raises UserError if the template cannot render it, or not consistently."""
        result = self.encode_batch([conversation])[0]
        if isinstance(result, Problem):
            raise UserError([result])
        return result

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[EncodedRow | DroppedRow | Problem]:
        """Encode conversations; in the place of one that the template cannot render stands the problem."""
        texts = [_or_problem(self._render, conversation) for conversation in conversations]
        tokenized = self.tokenizer.encode_batch(["" if isinstance(text, Problem) else text for text in texts])
        return [
            text if isinstance(text, Problem) else _or_problem(self._encode, conversation, tokens)
            for conversation, text, tokens in zip(conversations, texts, tokenized, strict=True)
        ]

    def _render(self, conversation: Conversation, count: int | None = None, add_generation_prompt: bool = False) -> str:
        fields = [message.fields for message in conversation.messages[:count]]
        return self.template.render(fields, conversation.tools, add_generation_prompt)

    def _encode(self, conversation: Conversation, tokens: TokenizedText) -> EncodedRow | DroppedRow:
        dropped = functools.partial(DroppedRow, conversation.file, conversation.line)
        if self.placeholders is not None:
            self.placeholders.check_ids(conversation.place, len(conversation.images), tokens.ids)
        if not any(message.supervised for message in conversation.messages):
            return dropped("every assistant turn is marked as not learned")
        notes = unrendered_keys(conversation, tokens.text, self.template)
        located = self._locate(conversation, tokens)
        plan = plan_row(located.replies, len(located.ids), self.budgets)
        whole_prompt = plan.prompt_length if isinstance(plan, TooLong) else None
        if isinstance(plan, TooLong):
            shorter = self.shorten_prompt(conversation, plan)
            if isinstance(shorter, str):
                return dropped(shorter)
            conversation = shorter
            located = self._locate(conversation, self._tokenize(conversation))
            plan = plan_row(located.replies, len(located.ids), self.budgets)
            if isinstance(plan, TooLong):
                return dropped(self._too_long(plan.prompt_length))
        input_ids = np.array(located.ids[: plan.end], dtype=np.int32)
        loss_mask = np.zeros(plan.end, dtype=np.bool_)
        for start, end in plan.supervised:
            loss_mask[start:end] = True
        if not loss_mask.any():
            return dropped("no token is left to learn: the replies are empty")
        images = 0 if self.placeholders is None else self.placeholders.whole_images(located.ids[: plan.end])
        image_tokens = 0 if self.images is None else images * self.images.placeholders_per_image
        return EncodedRow(
            input_ids=input_ids,
            loss_mask=loss_mask,
            file=conversation.file,
            line=conversation.line,
            prompt_tokens_cut=0 if whole_prompt is None else whole_prompt - plan.supervised[0][0],
            reply_tokens_cut=plan.reply_tokens_cut,
            tail_tokens_cut=plan.tail_tokens_cut,
            roles=_role_tokens(conversation, located, plan.end, image_tokens),
            has_control_text=any(self._control_text.search(message.text) for message in conversation.messages),
            images=tuple(conversation.images[:images]) if images else (),
            notes=notes,
        )

    def _tokenize(self, conversation: Conversation) -> TokenizedText:
        return self.tokenizer.encode_batch([self._render(conversation)])[0]

    def _too_long(self, prompt_length: int, detail: str = "") -> str:
        limit = self.budgets.max_input_length
        return f"the prompt of the first reply takes {prompt_length} tokens{detail}, max_input_length is {limit}"

    def shorten_prompt(self, conversation: Conversation, too_long: TooLong) -> Conversation | str:
        """Return the conversation with the last user text before the reply shortened to fit, or why that cannot be."""
        roles = [message.role for message in conversation.messages[: too_long.index]]
        if "user" not in roles:
            return self._too_long(too_long.prompt_length, " and has no user text to shorten")
        user = len(roles) - 1 - roles[::-1].index("user")
        messages = list(conversation.messages)
        ends = [end for _, end in self.tokenizer.encode(messages[user].text).offsets]
        keep, excess = len(ends), too_long.prompt_length - self.budgets.max_input_length
        while (keep := keep - max(1, excess)) > 0:
            messages[user] = conversation.messages[user].shortened(ends[keep - 1])
            shorter = replace(conversation, messages=tuple(messages))
            excess = self.prompt_length(shorter, too_long.index) - self.budgets.max_input_length
            if excess <= 0:
                return shorter
        detail = f", {len(ends)} of them the user's text: nothing of it would be left"
        return self._too_long(too_long.prompt_length, detail)

    def render_prompt(self, conversation: Conversation, index: int) -> str:
        """Return the text before the reply at `index`, generation prompt included. Raises TemplateRefusal."""
        return self._render(conversation, index, add_generation_prompt=True)

    def prompt_length(self, conversation: Conversation, index: int) -> int:
        """Return how many tokens the prompt of the reply at `index` takes. Raises TemplateRefusal."""
        return len(self.tokenizer.encode(self.render_prompt(conversation, index)).ids)

    def locate(self, conversation: Conversation) -> Located:
        """Return the whole conversation as training gets it, budgets aside, with the position of each reply.

        Raises TemplateRefusal, or UserError where the turns are not prefixes of the whole.
        """
        return self._locate(conversation, self._tokenize(conversation), to_end=True)

    def _locate(
        self, conversation: Conversation, tokens: TokenizedText, *, to_end: bool = False, cuts: tuple[int, ...] = ()
    ) -> Located:
        ids = tokens.ids
        replies: list[ReplySpan] = []
        last = len(conversation.messages) - 1
        if conversation.messages[last].role == "assistant" and not self.reply_format.closing_stops:
            ids = [*ids, self.reply_format.stop_id]
        for index, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            begin, stop = self._reply_characters(conversation, index, tokens.text)
            first = tokens.first_ending_after(begin)
            if first < len(tokens.ids) and tokens.starts_before(first, begin):
                if tokens.ids[first] in self.tokenizer.special_ids:
                    first += 1
                elif message.supervised and (pieces := self.tokenizer.encode_pieces(tokens.text, (*cuts, begin))):
                    return self._locate(conversation, pieces, to_end=to_end, cuts=(*cuts, begin))
            end = max(first, tokens.first_starting_at(stop))
            if not self.reply_format.closing_stops and end < len(ids) and ids[end] in self.reply_format.stop_ids:
                # Without a header of its own for the next message, a stop token there would be the user's text.
                end += index == last or self.reply_format.headers.get(conversation.messages[index + 1].role) != ""
            replies.append(ReplySpan(index, first, end, message.supervised))
            if message.supervised and first > self.budgets.max_input_length and not to_end:
                break  # this turn and all later ones will not be kept
        return Located(ids, tokens, replies)

    def _reply_characters(self, conversation: Conversation, index: int, text: str) -> tuple[int, int]:
        # Where the reply's supervised characters begin and end in `text`.
        prompt = self.render_prompt(conversation, index)
        is_last = index == len(conversation.messages) - 1
        upto = text if is_last else self._render(conversation, index + 1)
        for part in (prompt, upto):
            if not text.startswith(part):
                what = f"the chat template is not prefix-consistent at messages[{index}]: {difference(part, text)}"
                raise UserError.single(conversation.place, what, NOT_PREFIX_FIX)
        closing = self.reply_format.closing
        content_end = len(upto) - len(closing)
        if content_end < len(prompt) or not upto.endswith(closing):
            end = upto[len(prompt) :][-40:]
            what = f"the chat template closes messages[{index}] with {end!r}, not with {closing!r}"
            raise UserError.single(conversation.place, what, NOT_PREFIX_FIX)
        message = conversation.messages[index]
        is_empty = not upto[len(prompt) : content_end].removeprefix(self.reply_format.prefix).strip()
        if is_empty and message.supervised and message.fields.keys() != {"role", "content"}:
            raise UserError.single(
                f"{conversation.place}: messages[{index}]",
                "the chat template renders nothing of this reply: nothing would be learned but its end; "
                f"the keys are: {listed_keys(message.fields)}",
                "write what the model is to say as 'content', mark the turn with 'loss': false, or remove the row",
            )
        return len(prompt), content_end + self.reply_format.closing_supervised


def _or_problem(encode: Callable[..., T], conversation: Conversation, *arguments: Any) -> T | Problem:
    try:
        return encode(conversation, *arguments)
    except TemplateRefusal as refusal:
        return Problem(conversation.place, f"the chat template refuses this conversation: {refusal}")
    except UserError as error:
        return error.problems[0]


def _role_tokens(conversation: Conversation, located: Located, length: int, image_tokens: int) -> RoleTokens:
    # The contents stand in the text in order. One that the template changed, more than stripped, is not counted.
    counts = dict.fromkeys(("system", "user", "assistant", "other"), 0)
    position = 0
    tokens = located.tokens
    for role, text in ((message.role, text) for message in conversation.messages for text in message.texts):
        content = text
        start = tokens.text.find(content, position)
        if start < 0:
            content = content.strip()
            start = tokens.text.find(content, position)
            if start < 0:
                continue
        position = start + len(content)
        first = tokens.first_ending_after(start)
        end = min(tokens.first_starting_at(position), length)
        counts[role if role in counts else "other"] += max(0, end - first)
    template = length - sum(counts.values()) - image_tokens
    return RoleTokens(**counts, template=template, image=image_tokens)
