"""Does every reply that is learned end with a token on which generation stops? Counted over the encoded rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from glm_edge_ft.data.dataset import EncodedDataset

_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class ReplyEnds:
    """How the supervised replies of a data set end."""

    replies: int
    stopping: int  # end with a stop token, which is learned with them
    cut: int  # were cut by `max_output_length`; a cut reply teaches no stop
    first_other: str  # `file:line` of the first row with a reply that neither stops nor was cut, or ""

    @property
    def others(self) -> int:
        """How many replies teach no stop although they are whole."""
        return self.replies - self.stopping - self.cut

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON-able data."""
        return {**asdict(self), "others": self.others}


def count_reply_ends(dataset: EncodedDataset, stop_ids: Iterable[int]) -> ReplyEnds:
    """Look at the last token of every supervised run of tokens; memory does not grow with the data."""
    stops = np.array(sorted(stop_ids))
    replies = stopping = cut = 0
    first_other = ""
    for first in range(0, len(dataset), _ROWS_AT_ONCE):
        records = dataset.rows_info[first : first + _ROWS_AT_ONCE]
        begin, end = int(records["start"][0]), int(records["start"][-1]) + int(records["length"][-1])
        ids, mask = dataset.tokens(begin, end)
        last_of_row = records["start"] + records["length"] - 1 - begin
        goes_on = np.append(mask[1:], False)
        goes_on[last_of_row] = False
        places = np.flatnonzero(mask & ~goes_on)
        rows = np.searchsorted(records["start"] - begin, places, side="right") - 1
        is_kept = places <= last_of_row[rows]  # rows in between may have been left out
        places, rows = places[is_kept], rows[is_kept]
        stops_there = np.isin(ids[places], stops)
        was_cut = ~stops_there & (places == last_of_row[rows]) & (records["reply_tokens_cut"][rows] > 0)
        others = np.flatnonzero(~stops_there & ~was_cut)
        replies, stopping, cut = replies + len(places), stopping + int(stops_there.sum()), cut + int(was_cut.sum())
        if len(others) and not first_other:
            first_other = dataset.place(first + int(rows[others[0]]))
    return ReplyEnds(replies, stopping, cut, first_other)
