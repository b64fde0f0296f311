"""A data file of another tool, written anew in this project's format, with a report of what could not be converted."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from glm_edge_ft.data.conversation import ROLES_ALWAYS, ROLES_IF_RENDERED, Conversation, parse_conversation
from glm_edge_ft.data.convert_formats import FORMATS, translate
from glm_edge_ft.data.rendering import decode_calls
from glm_edge_ft.data.rows import MAXIMUM_PROBLEMS_SHOWN, RawRow, file_problem, iter_rows, limit_problems
from glm_edge_ft.errors import Problem, ProblemList, UserError, elide, shorten
from glm_edge_ft.files import atomic_path, can_be_made, expand_home

_ANY_ROLE = frozenset((*ROLES_ALWAYS, *ROLES_IF_RENDERED))
_ANY_NUMBER = 10**6  # of images
_LINES_SHOWN = 5


@dataclass
class Conversion:
    """What came of a file."""

    written: int = 0  # rows in the new file
    with_images: int = 0  # those of them that show an image
    left_out: list[Problem] = field(default_factory=list)  # rows that could not be converted
    missing_images: list[Problem] = field(default_factory=list)  # written rows whose image is not there
    notes: Counter[str] = field(default_factory=Counter)  # remarks, with the number of their rows

    def lines(self, target: Path) -> list[str]:
        """Return the report as text."""
        images = f", {self.with_images} of them with images" if self.with_images else ""
        lines = [f"{target}: {self.written} conversations{images}"]
        for title, problems in (
            ("could not be converted", self.left_out),
            ("have an image that is not there", self.missing_images),
        ):
            if problems:
                lines.append(f"{len(problems)} rows {title}:")
                lines += [str(problem) for problem in limit_problems(_by_reason(problems), "and so on")]
        lines += [f"{note}: {count} rows" for note, count in self.notes.most_common(MAXIMUM_PROBLEMS_SHOWN)]
        more = len(self.notes) - MAXIMUM_PROBLEMS_SHOWN
        return [*lines, f"... and {more} more remarks"] if more > 0 else lines


def convert_file(source: Path, target: Path, form: str, images: Path | None = None) -> Conversion:
    """Write the conversations of `source` to `target`, one a line; the file appears when it is whole.

    Args:
        source: `.json`, `.jsonl` or `.parquet`.
        target: the file to write, which must not be there yet.
        form: one of FORMATS.
        images: the folder that paths of images start from; the source's own by default. In the new file they start
            from its folder, as this project has it.

    Raises:
        UserError: an unknown format, a target that is there or cannot be written, or not one row that can be converted.
    """
    problems = ProblemList()
    if form not in FORMATS:
        problems.add(f"--from {form}", "is no known format", f"known ones: {', '.join(FORMATS)}")
    if target.exists():
        problems.add(str(target), "is there already", "name a new file; nothing is written over")
    if target.suffix != ".jsonl":
        problems.add(str(target), "one conversation a line is written", "let the name end in .jsonl")
    if images is not None and not images.is_dir():
        problems.add(f"--images {images}", "there is no such folder", "name the one that paths start from")
    if not can_be_made(target.absolute().parent):
        problems.add(str(target), "cannot be written: its folder cannot be made", "name another place")
    if (refusal := file_problem(source, source.name)) is not None:
        problems.problems.append(refusal)
    problems.raise_if_any()
    try:
        with atomic_path(target) as staged:
            with staged.open("w", encoding="utf-8") as out:
                conversion = _convert(source, out, form, images or source.parent, target.parent)
            if not conversion.written:
                what = Problem(str(source), f"not one row could be read as {form}", "see below; is --from right?")
                raise UserError([what, *limit_problems(_by_reason(conversion.left_out), source.name)])
    except OSError as error:
        raise UserError.single(str(target), f"cannot be written: {error.strerror}", "name another place") from error
    return conversion


def _convert(source: Path, out: TextIO, form: str, images: Path, folder: Path) -> Conversion:
    new_path = _path_maker(images, folder)
    result = Conversion()
    for row in iter_rows(source):
        try:
            conversation, decoded = _read(row, form)
        except UserError as error:
            result.left_out += error.problems[:1]
            continue
        result.notes.update(f"key {elide(key, 80)!r} has no meaning here" for key in conversation.ignored_keys)
        result.notes.update(conversation.notes)
        result.notes.update(["JSON text in a tool or a call of one is written as an object"] if decoded else [])
        paths = {path: new_path(path) for path in conversation.images}
        absent = next((path for path in paths.values() if not os.path.isfile(folder / path)), None)  # noqa: PTH113
        if absent is not None:
            fix = "give the folder that the paths start from with --images"
            result.missing_images.append(
                Problem(conversation.place, f"no such image: {shorten(str(folder / absent))}", fix)
            )
        out.write(json.dumps(_written(conversation, paths), ensure_ascii=False) + "\n")
        result.written += 1
        result.with_images += bool(paths)
    return result


def _read(row: RawRow | Problem, form: str) -> tuple[Conversation, list[str]]:
    """Return the conversation of a row and the JSON texts that were decoded in it. Raises UserError."""
    if isinstance(row, Problem):
        raise UserError([row])
    conversation, decoded, _ = decode_calls(parse_conversation(translate(row, form), _ANY_ROLE, _ANY_NUMBER))
    if not any(message.supervised for message in conversation.messages):
        raise UserError.single(row.place, "the row says that no reply of it is learned")
    return conversation, decoded


def _path_maker(images: Path, folder: Path) -> Callable[[str], str]:
    """Return what turns a path that starts from `images` into one that starts from `folder`.

    A folder may be reached through a link, so that what is above it is told by where it really is.
    """
    real_folder = os.path.realpath(folder)
    real_parent = functools.cache(os.path.realpath)

    def new_path(written: str) -> str:
        path = expand_home(written)
        if path.is_absolute():
            return str(path)
        path = images / path
        return os.path.relpath(os.path.join(real_parent(path.parent), path.name), real_folder)  # noqa: PTH118

    return new_path


def _written(conversation: Conversation, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return a conversation as a row of this project, with `paths` in the place of its images' own."""
    messages = []
    for message in conversation.messages:
        content: Any = message.text
        if message.images or len(message.parts) > 1:
            content = [part | {"image": paths[part["image"]]} if "image" in part else part for part in message.parts]
        learned = {"loss": False} if message.role == "assistant" and not message.supervised else {}
        messages.append({**message.fields, "content": content, **learned})
    return {"messages": messages} | ({} if conversation.tools is None else {"tools": list(conversation.tools)})


def _by_reason(problems: Sequence[Problem]) -> list[Problem]:
    """Return one problem for each reason, the most frequent first, with the lines of further rows that have it."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        reason = re.split(r",? (?:it|this one) is |: ", problem.what)[0]
        groups.setdefault(re.sub(r"\d+", "N", reason), []).append(problem)
    found = []
    for first, *others in sorted(groups.values(), key=len, reverse=True):
        lines = [":".join(problem.where.split(":")[:2]) for problem in others]
        more = f" and {len(lines) - _LINES_SHOWN} more" if len(lines) > _LINES_SHOWN else ""
        also = f" ({len(others) + 1} rows, also {', '.join(lines[:_LINES_SHOWN])}{more})" if others else ""
        found.append(Problem(first.where, f"{first.what}{also}", first.fix))
    return found
