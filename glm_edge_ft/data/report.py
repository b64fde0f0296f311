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

_PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
_ROLES = ("system", "user", "assistant", "other", "template")
_CUTS = {
    "prompt_tokens_cut": "prompt shortened (max_input_length)",
    "reply_tokens_cut": "reply cut (max_output_length)",
    "tail_tokens_cut": "last turns left out",
}
_LABEL_WIDTH = 22
_LONG_RUN = 64  # so many times the same token, as the placeholders of an image are, is shown once with the number
_GREEN, _PLAIN = "\x1b[30;42m", "\x1b[0m"


@dataclass(frozen=True)
class DataReport:
    """Counts over one encoded data set."""

    rows: int
    tokens: int
    supervised_tokens: int
    role_tokens: dict[
        str, int
    ]  # `template`: what the chat template wrote itself; `image`: placeholders, if there are any
    cut_rows: dict[str, int]  # for each kind of cut, how many rows lost something
    cut_tokens: dict[str, int]  # for each kind of cut, how many tokens were lost in all
    dropped_rows: int
    dropped: tuple[str, ...]  # the first rows that were left out: `file:line: reason`
    lengths: dict[str, int]  # percentiles in tokens, `p50` to `max`
    control_text_rows: int  # rows whose text holds something that the tokenizer turns into a control token
    control_text: tuple[str, ...]  # the first of them: `file:line`
    notices: tuple[str, ...]  # further remarks about the data, one sentence each

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
    roles = (*_ROLES, "image") if records["image"].any() else _ROLES
    sums = {name: int(records[name].sum(dtype=np.int64)) for name in ("length", "supervised", *roles, *_CUTS)}
    lengths = [
        int(np.percentile(records["length"], p, method="inverted_cdf")) if len(records) else 0
        for p in _PERCENTILES.values()
    ]
    return DataReport(
        rows=len(records),
        tokens=sums["length"],
        supervised_tokens=sums["supervised"],
        role_tokens={role: sums[role] for role in roles},
        cut_rows={kind: int(np.count_nonzero(records[kind])) for kind in _CUTS},
        cut_tokens={kind: sums[kind] for kind in _CUTS},
        dropped_rows=dropped_rows,
        dropped=tuple(dropped),
        lengths=dict(zip(_PERCENTILES, lengths, strict=True)),
        control_text_rows=control_text_rows,
        control_text=tuple(control_text),
        notices=tuple(notices),
    )


def format_report(report: DataReport, title: str = "data") -> str:
    """Return the report as a plain text table for the terminal."""

    def share(part: int) -> str:
        return f"{100 * part / report.tokens:.1f} %" if report.tokens else ""

    lines = [title, _line("rows", report.rows), _line("tokens", report.tokens)]
    for role, count in report.role_tokens.items():
        if count or role != "other":
            lines.append(_line(f"  {role}", count, share(count)))
    lines.append(_line("supervised tokens", report.supervised_tokens, share(report.supervised_tokens)))
    lines.append("  length in tokens      " + "  ".join(f"{name} {value:,}" for name, value in report.lengths.items()))
    for kind, rows in report.cut_rows.items():
        if rows:
            lines.append(_line(f"rows cut: {_CUTS[kind]}", rows, f"{report.cut_tokens[kind]:,} tokens lost"))
    if report.dropped_rows:
        lines += [_line("rows dropped", report.dropped_rows), *(f"    {place}" for place in report.dropped)]
        if report.dropped_rows > len(report.dropped):
            lines.append(f"    ... and {report.dropped_rows - len(report.dropped)} more")
    if report.control_text_rows:
        places = ", ".join(report.control_text)
        lines.append(_line("rows with control tokens in their text", report.control_text_rows, places))
    return "\n".join([*lines, *(f"  note: {notice}" for notice in report.notices)])


def _line(label: str, value: int, note: str = "") -> str:
    text = f"{label:<{_LABEL_WIDTH}}{value:>14,}" if len(label) <= _LABEL_WIDTH else f"{label}:  {value:,}"
    return f"  {text}{f'   {note}' if note else ''}"


def preview_json(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return rows (`EncodedDataset.row`) as `{"file", "line", "input_ids", "labels", "tokens"}`."""
    return [
        {
            "file": row["file"],
            "line": int(row["line"]),
            "input_ids": [int(token) for token in row["input_ids"]],
            "labels": [int(label) for label in row["labels"]],
            "tokens": [_token_text(int(token), tokenizer) for token in row["input_ids"]],
        }
        for row in rows
    ]


def _token_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    # One that is only part of a character is shown as the vocabulary spells it.
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return str(tokenizer.convert_ids_to_tokens(token_id)) if "\ufffd" in text else text


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
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
