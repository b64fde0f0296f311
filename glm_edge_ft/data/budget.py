"""The two budgets: what of a row is kept when it is longer than the config allows.

- A prompt is everything before a reply. A later reply whose prompt is longer than `max_input_length` ends the row
  before its turn: whole turns are left out at the end, so that the ids stay a prefix of what the template renders.
- Where the first supervised reply's prompt is too long, the text of the last user message before it is shortened from
  its end and the conversation is rendered anew (`ConversationEncoder.shorten_prompt`); what the template writes stays
  whole, image placeholders included. A row that still does not fit, or would keep nothing of that text, is dropped.
- A supervised reply (with its stop token) longer than `max_output_length` is cut there, and the row ends: later turns
  would follow a broken history. A cut reply teaches no stop.

So no row is longer than `max_input_length + max_output_length`.
"""

from __future__ import annotations

from dataclasses import dataclass


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
