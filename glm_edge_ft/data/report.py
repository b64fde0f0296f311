"""What the encoded data holds, in numbers, and single rows token by token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from glm_edge_ft import IGNORE_INDEX

PERCENTILES = (50, 90, 95, 99, 100)
_ROLES = ("system", "user", "assistant", "other", "template")
_CUTS = {
    "prompt_tokens_cut": "prompt shortened (max_input_length)",
    "reply_tokens_cut": "reply cut (max_output_length)",
    "tail_tokens_cut": "last turns left out",
}
_LONG_RUN = 64  # so many times the same token, as the placeholders of an image are, is shown once with the number
_GREEN, _PLAIN = "\x1b[30;42m", "\x1b[0m"


@dataclass(frozen=True)
class DataReport:
    """Counts over one encoded data set.

    Attributes:
        rows: rows that were encoded.
        tokens: tokens in them.
        supervised_tokens: tokens that bear loss.
        role_tokens: tokens by role; `template` is what the chat template wrote itself, and `image`, if the data has
            images, their placeholders.
        cut_rows: for each kind of cut, how many rows lost something.
        cut_tokens: for each kind of cut, how many tokens were lost in all.
        dropped_rows: rows left out.
        dropped: the first of them: `file:line: reason`.
        lengths: length percentiles in tokens, `p50` to `max`.
        control_text_rows: rows whose text holds something that the tokenizer turns into a control token.
        control_text: the first of them: `file:line`.
        notices: further remarks about the data, one sentence each.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    role_tokens: dict[str, int]
    cut_rows: dict[str, int]
    cut_tokens: dict[str, int]
    dropped_rows: int
    dropped: tuple[str, ...]
    lengths: dict[str, int]
    control_text_rows: int
    control_text: tuple[str, ...]
    notices: tuple[str, ...]

    def remarks(self) -> list[str]:
        """Return what a run should say of its data, one sentence each: rows dropped or cut, control tokens, notices."""
        remarks = []
        if self.dropped_rows:
            remarks.append(f"{self.dropped_rows} rows dropped: {_places(self.dropped[:3], self.dropped_rows)}")
        for kind, rows in self.cut_rows.items():
            if rows:
                remarks.append(f"{rows} rows cut, {_CUTS[kind]}: {self.cut_tokens[kind]:,} tokens lost")
        if self.control_text_rows:
            places = _places(self.control_text, self.control_text_rows)
            remarks.append(f"{self.control_text_rows} rows have control tokens in their text: {places}")
        return [*remarks, *self.notices]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return asdict(self)


def _places(places: Sequence[str], count: int) -> str:
    more = f"; and {count - len(places)} more" if count > len(places) else ""
    return "; ".join(places) + more


def build_report(
    records: NDArray[Any],
    *,
    dropped_rows: int,
    dropped: Sequence[str],
    control_text_rows: int,
    control_text: Sequence[str],
    notices: Sequence[str],
) -> DataReport:
    """Sum up the records (`cache.ROW_RECORD`) of the encoded rows, and what was noted while they were encoded."""
    lengths = records["length"]
    roles = (*_ROLES, "image") if records["image"].any() else _ROLES
    named = {f"p{p}" if p < 100 else "max": p for p in PERCENTILES}
    return DataReport(
        rows=len(records),
        tokens=int(lengths.sum(dtype=np.int64)),
        supervised_tokens=int(records["supervised"].sum(dtype=np.int64)),
        role_tokens={role: int(records[role].sum(dtype=np.int64)) for role in roles},
        cut_rows={kind: int(np.count_nonzero(records[kind])) for kind in _CUTS},
        cut_tokens={kind: int(records[kind].sum(dtype=np.int64)) for kind in _CUTS},
        dropped_rows=dropped_rows,
        dropped=tuple(dropped),
        lengths={
            name: int(np.percentile(lengths, p, method="inverted_cdf")) if len(lengths) else 0
            for name, p in named.items()
        },
        control_text_rows=control_text_rows,
        control_text=tuple(control_text),
        notices=tuple(notices),
    )


def format_report(report: DataReport, title: str = "data") -> str:
    """Return the report as a plain text table for the terminal."""
    lines = [title, _line("rows", report.rows), _line("tokens", report.tokens)]
    for role, count in report.role_tokens.items():
        if count or role != "other":
            lines.append(_line(f"  {role}", count, _share(count, report.tokens)))
    share = _share(report.supervised_tokens, report.tokens)
    lines.append(_line("supervised tokens", report.supervised_tokens, share))
    lines.append("  length in tokens      " + "  ".join(f"{name} {value:,}" for name, value in report.lengths.items()))
    for kind, text in _CUTS.items():
        rows = report.cut_rows[kind]
        if rows:
            lines.append(_line(f"rows cut: {text}", rows, f"{report.cut_tokens[kind]:,} tokens lost"))
    if report.dropped_rows:
        lines.append(_line("rows dropped", report.dropped_rows))
        lines += [f"    {place}" for place in report.dropped]
        if report.dropped_rows > len(report.dropped):
            lines.append(f"    ... and {report.dropped_rows - len(report.dropped)} more")
    if report.control_text_rows:
        places = ", ".join(report.control_text)
        lines.append(_line("rows with control tokens in their text", report.control_text_rows, places))
    lines += [f"  note: {notice}" for notice in report.notices]
    return "\n".join(lines)


_LABEL_WIDTH = 22


def _line(label: str, value: int, note: str = "") -> str:
    text = f"{label:<{_LABEL_WIDTH}}{value:>14,}" if len(label) <= _LABEL_WIDTH else f"{label}:  {value:,}"
    return f"  {text}{f'   {note}' if note else ''}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def token_texts(input_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return each token as text; one that is only part of a character as the vocabulary spells it."""
    texts = []
    for token_id in input_ids:
        text = str(tokenizer.decode([int(token_id)], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        texts.append(str(tokenizer.convert_ids_to_tokens(int(token_id))) if "\ufffd" in text else text)
    return texts


def preview_json(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return rows (`EncodedDataset.row`) as `{"file", "line", "input_ids", "labels", "tokens"}`."""
    return [
        {
            "file": row["file"],
            "line": int(row["line"]),
            "input_ids": [int(token) for token in row["input_ids"]],
            "labels": [int(label) for label in row["labels"]],
            "tokens": token_texts(row["input_ids"], tokenizer),
        }
        for row in rows
    ]


def preview(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """Return rows token by token, tokens separated by `|`, supervised ones on green or, without colour, in «»."""
    blocks = []
    for row in preview_json(rows, tokenizer):
        supervised = [label != IGNORE_INDEX for label in row["labels"]]
        mark = (_GREEN, _PLAIN) if color else ("«", "»")
        pieces = []
        for (text, is_supervised), run in itertools.groupby(zip(row["tokens"], supervised, strict=True)):
            piece = f"{mark[0]}{_visible(text)}{mark[1]}" if is_supervised else _visible(text)
            count = len(list(run))
            pieces += [piece] * count if count < _LONG_RUN else [f"{piece} x {count}"]
        head = f"{row['file']}:{row['line']}  {len(supervised)} tokens, {sum(supervised)} supervised"
        blocks.append(f"{head}\n{'|'.join(pieces)}")
    return "\n\n".join(blocks)


def _visible(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
