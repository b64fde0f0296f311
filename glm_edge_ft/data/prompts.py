"""Evaluation: a prompt and a reference for each assistant turn, and a generated reply back to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_edge_ft.data.budget import ReplySpan, TooLong
from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.encoding import ConversationEncoder, Located
from glm_edge_ft.data.images import resolve
from glm_edge_ft.data.template import TemplateRefusal
from glm_edge_ft.errors import UserError


@dataclass(frozen=True)
class PromptSample:
    """What is generated from, and what it is compared with."""

    prompt_ids: NDArray[np.int32]  # (length,), the true history up to the generation prompt, nothing of the reference
    prompt: str  # the text that the ids stand for
    reference: (
        str  # the tokens that training supervises there, as text, cleaned as a prediction is (`clean_prediction`)
    )
    file: str  # name of the data file
    line: int  # 1-based line in it
    turn: int  # index of the assistant turn among the conversation's messages
    prompt_tokens_cut: int  # tokens that the history lost to fit `max_input_length`
    images: tuple[str, ...] = ()  # paths of the images whose placeholders are in `prompt_ids`, in their order


def encode_prompts(
    encoder: ConversationEncoder, conversation: Conversation, image_folder: Path = Path()
) -> list[PromptSample]:
    """Return one sample for each supervised assistant turn of a conversation.

    A history longer than `max_input_length` loses its oldest turns first (system messages stay, a turn begins with a
    user message), then the end of the last user text, as in training; so the ids are always what the template renders
    for some conversation. Where even that does not fit, the newest `max_input_length` tokens are kept, less what is
    left of an image that would be cut in two: a sample is never left out. Several turns may share an image.

    Image paths are relative to `image_folder`, that of the data file. Raises UserError where the template cannot render
    the history, or leaves an image of it out.
    """
    try:
        located = encoder.locate(conversation)
        replies = [reply for reply in located.replies if reply.supervised]
        return [_sample(encoder, conversation, located, reply, image_folder) for reply in replies]
    except TemplateRefusal as refusal:
        raise UserError.single(conversation.place, f"the chat template refuses this conversation: {refusal}") from None


def _sample(
    encoder: ConversationEncoder, conversation: Conversation, located: Located, reply: ReplySpan, image_folder: Path
) -> PromptSample:
    limit, full = encoder.budgets.max_input_length, located.ids[: reply.start]
    supervised = located.ids[reply.start : min(reply.end, reply.start + encoder.budgets.max_output_length)]
    if encoder.placeholders is not None:
        images_before = sum(len(message.images) for message in conversation.messages[: reply.index])
        encoder.placeholders.check_ids(conversation.place, images_before, full)
    kept, index, ids = conversation, reply.index, full
    while len(ids) > limit and (drop := _oldest_turn(kept, index)) is not None:
        kept = replace(kept, messages=kept.messages[: drop.start] + kept.messages[drop.stop :])
        index -= len(drop)
        ids = _encode(encoder, kept, index)
    if len(ids) > limit:
        shorter = encoder.shorten_prompt(kept, TooLong(index, len(ids)))
        if isinstance(shorter, str):
            ids = ids[-limit:]
        else:
            kept, ids = shorter, _encode(encoder, shorter, index)
    images = tuple(path for message in kept.messages[:index] for path in message.images)
    if encoder.placeholders is not None:
        ids = encoder.placeholders.without_partial_image(ids)
        images = images[len(images) - encoder.placeholders.whole_images(ids) :]
    return PromptSample(
        prompt_ids=np.array(ids, dtype=np.int32),
        prompt=encoder.render_prompt(kept, index),
        reference=clean_prediction(encoder, supervised),
        file=conversation.file,
        line=conversation.line,
        turn=reply.index,
        prompt_tokens_cut=max(0, len(full) - len(ids)),
        images=tuple(resolve(path, image_folder) for path in images),
    )


def _encode(encoder: ConversationEncoder, conversation: Conversation, turn: int) -> list[int]:
    return encoder.tokenizer.encode(encoder.render_prompt(conversation, turn)).ids


def _oldest_turn(conversation: Conversation, index: int) -> range | None:
    # From the first message that is not a system message to the next user message; None if that is the last turn.
    roles = [message.role for message in conversation.messages[:index]]
    first = next((position for position, role in enumerate(roles) if role != "system"), len(roles))
    later = next((position for position in range(first + 1, len(roles)) if roles[position] == "user"), None)
    return None if later is None else range(first, later)


def clean_prediction(encoder: ConversationEncoder, ids: Sequence[int]) -> str:
    """Return the text of a reply's ids (length,): up to its first stop token, control tokens included."""
    reply_format = encoder.reply_format
    end = next((position for position, token in enumerate(ids) if int(token) in reply_format.stop_ids), len(ids))
    text = encoder.tokenizer.decode([int(token) for token in ids[:end]]).removeprefix(reply_format.prefix)
    return text if reply_format.closing_stops else text.removesuffix(reply_format.closing)
