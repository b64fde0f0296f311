"""The two budgets: what of a row is kept when it is longer than the config allows.

- A prompt is everything before a reply. A later reply whose prompt is longer than `max_input_length` ends the row
  before its turn: whole turns are left out at the end, so that the ids stay a prefix of what the template renders.
- Where the first supervised reply's prompt is too long, the text of the last user message before it is shortened from
  its end and the conversation is rendered anew; what the template writes stays whole, image placeholders included. A
  row that still does not fit, or that would keep nothing of the user's text, is dropped.
- A supervised reply (with its stop token) longer than `max_output_length` is cut there, and the row ends: later turns
  would follow a broken history. A cut reply teaches no stop.

So no row is longer than `max_input_length + max_output_length`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tokenizers import Encoding

from glm_edge_ft.data.conversation import Conversation


@dataclass(frozen=True)
class Budgets:
    """Most tokens of a prompt and of a reply."""

    max_input_length: int
    max_output_length: int


@dataclass(frozen=True)
class ReplySpan:
    """Tokens `[start, end)` of a reply, its stop token included, and the index of its message."""

    index: int
    start: int
    end: int
    supervised: bool


@dataclass(frozen=True)
class RowPlan:
    """What is kept: tokens `[0, end)`, of which the `supervised` ranges bear loss."""

    end: int
    supervised: tuple[tuple[int, int], ...]
    reply_tokens_cut: int
    tail_tokens_cut: int


@dataclass(frozen=True)
class TooLong:
    """The prompt of the first supervised reply, message `index`, takes more than `max_input_length` tokens."""

    index: int
    prompt_length: int

    def reason(self, budgets: Budgets, spared: str = "") -> str:
        """Return why such a row is dropped."""
        return (
            f"the prompt of the first reply takes {self.prompt_length} tokens{spared}, "
            f"max_input_length is {budgets.max_input_length}"
        )


def plan_row(replies: list[ReplySpan], length: int, budgets: Budgets) -> RowPlan | TooLong:
    """Decide what of a row of `length` tokens is kept. At least one reply is supervised."""
    kept: list[tuple[int, int]] = []
    for reply in replies:
        if not reply.supervised:
            continue
        if reply.start > budgets.max_input_length:
            if not kept:
                return TooLong(reply.index, reply.start)
            return RowPlan(kept[-1][1], tuple(kept), 0, length - kept[-1][1])
        cut = reply.start + budgets.max_output_length
        if reply.end > cut:
            return RowPlan(cut, (*kept, (reply.start, cut)), reply.end - cut, length - reply.end)
        kept.append((reply.start, reply.end))
    # What follows the last supervised reply is kept as it is where there is room for it.
    end = length if length <= budgets.max_input_length + budgets.max_output_length else kept[-1][1]
    return RowPlan(end, tuple(kept), 0, length - end)


def shorten_prompt(
    conversation: Conversation,
    too_long: TooLong,
    budgets: Budgets,
    prompt_length: Callable[[Conversation, int], int],
    encode: Callable[[str], Encoding],
) -> Conversation | str:
    """Return the conversation with the last user text before the reply shortened to fit, or why that cannot be.

    Args:
        conversation: the whole conversation.
        too_long: which prompt is too long, and by how much.
        budgets: what it must fit.
        prompt_length: counts the tokens of the prompt of a message in a conversation.
        encode: tokenizes a text with character offsets.
    """
    before = range(too_long.index - 1, -1, -1)
    user = next((index for index in before if conversation.messages[index].role == "user"), None)
    if user is None:
        return too_long.reason(budgets, " and has no user text to shorten")
    text = conversation.messages[user].text
    ends = [end for _, end in encode(text).offsets]
    excess = too_long.prompt_length - budgets.max_input_length
    keep = len(ends)
    length = too_long.prompt_length
    while keep > 0:
        keep -= max(1, excess)
        if keep <= 0:
            break
        shorter = _shortened(conversation, user, ends[keep - 1])
        length = prompt_length(shorter, too_long.index)
        excess = length - budgets.max_input_length
        if excess <= 0:
            return shorter
    spared = f", {len(ends)} of them the user's text: nothing of it would be left"
    return too_long.reason(budgets, spared)


def _shortened(conversation: Conversation, index: int, length: int) -> Conversation:
    messages = list(conversation.messages)
    messages[index] = messages[index].shortened(length)
    return replace(conversation, messages=tuple(messages))
