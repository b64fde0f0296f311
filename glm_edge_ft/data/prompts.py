"""Evaluation: a prompt and a reference for each assistant turn, and a generated reply back to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_edge_ft.data.budget import Budgets, ReplySpan, TooLong, shorten_prompt
from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.encoding import ConversationEncoder, Located
from glm_edge_ft.data.images import resolve
from glm_edge_ft.data.template import TemplateRefusal
from glm_edge_ft.errors import UserError


@dataclass(frozen=True)
class PromptSample:
    """What is generated from, and what it is compared with.

    Attributes:
        prompt_ids: (length,) int32; the true history up to the generation prompt, nothing of the reference.
        prompt: the text that the ids stand for.
        reference: text of the tokens that training supervises there: all that the template renders of the reply, tool
            calls and reasoning too, cut at `max_output_length`, and cleaned as a prediction is (`clean_prediction`).
        file: name of the data file.
        line: 1-based line in it.
        turn: index of the assistant turn among the conversation's messages.
        prompt_tokens_cut: tokens that the history lost to fit `max_input_length`.
        images: where the images are whose placeholders are in `prompt_ids`, in their order.
    """

    prompt_ids: NDArray[np.int32]
    prompt: str
    reference: str
    file: str
    line: int
    turn: int
    prompt_tokens_cut: int
    images: tuple[str, ...] = ()


def encode_prompts(
    encoder: ConversationEncoder, conversation: Conversation, image_folder: Path = Path()
) -> list[PromptSample]:
    """Return one sample for each supervised assistant turn of a conversation.

    A history longer than `max_input_length` loses its oldest turns first (system messages stay, a turn begins with a
    user message), then the end of the last user text, as in training; so the ids are always what the template renders
    for some conversation. Where even that does not fit, the newest `max_input_length` tokens are kept, less what is
    left of an image that would be cut in two: a sample is never left out. Several turns may share an image.

    Args:
        encoder: knows the template and the budgets.
        conversation: as parsed.
        image_folder: what image paths are relative to: the data file's folder.

    Raises:
        UserError: the template cannot render the history, or leaves an image of it out.
    """
    try:
        located = encoder.locate(conversation)
    except TemplateRefusal as refusal:
        raise UserError.single(conversation.place, f"the chat template refuses this conversation: {refusal}") from None
    return [
        _sample(encoder, conversation, located, reply, image_folder) for reply in located.replies if reply.supervised
    ]


def _sample(
    encoder: ConversationEncoder, conversation: Conversation, located: Located, reply: ReplySpan, image_folder: Path
) -> PromptSample:
    budgets, turn, full = encoder.budgets, reply.index, located.ids[: reply.start]
    supervised = located.ids[reply.start : min(reply.end, reply.start + budgets.max_output_length)]
    try:
        _check_images(encoder, conversation, turn, full)
        kept, index, ids = conversation, turn, full
        while len(ids) > budgets.max_input_length and (drop := _oldest_turn(kept, index)) is not None:
            messages = tuple(message for position, message in enumerate(kept.messages) if position not in drop)
            kept, index = replace(kept, messages=messages), index - len(drop)
            ids = _encode(encoder, kept, index)
        if len(ids) > budgets.max_input_length:
            kept, ids = _shortened(encoder, kept, index, ids, budgets)
        prompt = encoder.render_prompt(kept, index)
    except TemplateRefusal as refusal:
        raise UserError.single(conversation.place, f"the chat template refuses the history: {refusal}") from None
    images = tuple(path for message in kept.messages[:index] for path in message.images)
    if encoder.placeholders is not None:
        ids = encoder.placeholders.without_partial_image(ids)
        count = encoder.placeholders.whole_images(ids)
        images = images[len(images) - count :]
    return PromptSample(
        prompt_ids=np.array(ids, dtype=np.int32),
        prompt=prompt,
        reference=clean_prediction(encoder, supervised),
        file=conversation.file,
        line=conversation.line,
        turn=turn,
        prompt_tokens_cut=max(0, len(full) - len(ids)),
        images=tuple(resolve(path, image_folder) for path in images),
    )


def _check_images(encoder: ConversationEncoder, conversation: Conversation, turn: int, ids: list[int]) -> None:
    if encoder.placeholders is None:
        return
    history = replace(conversation, messages=conversation.messages[:turn])
    problem = encoder.placeholders.check_ids(history, ids)
    if problem is not None:
        raise UserError([problem])


def _encode(encoder: ConversationEncoder, conversation: Conversation, turn: int) -> list[int]:
    return encoder.tokenizer.encode(encoder.render_prompt(conversation, turn)).ids


def _oldest_turn(conversation: Conversation, index: int) -> range | None:
    # From the first message that is not a system message to the next user message; None if that is the last turn.
    roles = [message.role for message in conversation.messages[:index]]
    first = next((position for position, role in enumerate(roles) if role != "system"), len(roles))
    later = next((position for position in range(first + 1, len(roles)) if roles[position] == "user"), None)
    return None if later is None else range(first, later)


def _shortened(
    encoder: ConversationEncoder, conversation: Conversation, index: int, ids: list[int], budgets: Budgets
) -> tuple[Conversation, list[int]]:
    too_long = TooLong(index, len(ids))
    shorter = shorten_prompt(conversation, too_long, budgets, encoder.prompt_length, encoder.tokenizer.encode)
    if isinstance(shorter, str):
        return conversation, ids[-budgets.max_input_length :]
    return shorter, _encode(encoder, shorter, index)


def clean_prediction(encoder: ConversationEncoder, ids: Sequence[int]) -> str:
    """Return the text of a reply, generated or to be generated: up to its first stop token, control tokens included.

    Args:
        encoder: knows the stop tokens and what the template writes around a reply.
        ids: (length,) the ids of the reply, without the prompt.
    """
    reply_format = encoder.reply_format
    end = next((position for position, token in enumerate(ids) if int(token) in reply_format.stop_ids), len(ids))
    text = encoder.tokenizer.decode([int(token) for token in ids[:end]]).removeprefix(reply_format.prefix)
    return text if reply_format.closing_stops else text.removesuffix(reply_format.closing)
