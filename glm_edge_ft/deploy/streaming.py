"""A reply as it comes: new tokens in, text out, and never a character that the finished reply does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers.generation.streamers import BaseStreamer

from glm_edge_ft.data.template import ReplyFormat

_INCOMPLETE = "\ufffd"  # what decoding makes of the first bytes of a character


class ReplyStreamer(BaseStreamer):
    """Gives a reply to `write` piece by piece; together the pieces are what `clean` makes of all tokens.

    What may still change is held back: a character whose bytes are not all there, the text that the template writes
    before a reply, and the beginning of what it writes after one.

    Args:
        clean: new token ids → the reply's text, as evaluation makes it.
        reply_format: what the template writes around a reply.
        write: shows a piece of text.
    """

    def __init__(
        self, clean: Callable[[Sequence[int]], str], reply_format: ReplyFormat, write: Callable[[str], None]
    ) -> None:
        self.clean, self.reply_format, self.write = clean, reply_format, write
        self.ids: list[int] = []
        self.shown = ""
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, `(1, length)`, which is passed over, and then each new token, `(1,)`."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        self._show(self._settled(self.clean(self.ids)))

    def end(self) -> None:
        """Show what was held back."""
        self._show(self.clean(self.ids))

    def _settled(self, text: str) -> str:
        if self.reply_format.prefix.startswith(text):
            return ""
        text = text.rstrip(_INCOMPLETE)
        closing = "" if self.reply_format.closing_stops else self.reply_format.closing
        for length in range(min(len(closing) - 1, len(text)), 0, -1):
            if text.endswith(closing[:length]):
                return text[:-length]
        return text

    def _show(self, text: str) -> None:
        new = text[len(self.shown) :]
        if new:
            self.shown = text
            self.write(new)
