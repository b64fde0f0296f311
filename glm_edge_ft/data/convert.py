"""A data file of another tool, written anew in this project's format, with a report of what could not be converted."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge_ft.data.conversation import ROLES_ALWAYS, ROLES_IF_RENDERED, parse_conversation
from glm_edge_ft.data.convert_formats import READERS, UnconvertibleError, to_row
from glm_edge_ft.data.rows import MAXIMUM_PROBLEMS_SHOWN, RawRow, iter_rows, limit_problems
from glm_edge_ft.errors import Problem, UserError

_ANY_ROLE = frozenset((*ROLES_ALWAYS, *ROLES_IF_RENDERED))
_ANY_NUMBER = 10**6  # of images


@dataclass(frozen=True)
class Conversion:
    """What came of a file.

    Attributes:
        written: rows in the new file.
        with_images: those of them that show an image.
        left_out: the rows that could not be converted, each with `file:line` and the reason.
        missing_images: written rows whose image is not there.
        ignored_keys: keys without a meaning here, with the number of rows that have them.
    """

    written: int
    with_images: int
    left_out: tuple[Problem, ...]
    missing_images: tuple[Problem, ...]
    ignored_keys: dict[str, int]

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
                lines += [str(problem) for problem in limit_problems(problems, "and so on", MAXIMUM_PROBLEMS_SHOWN)]
        lines += [f"key {key!r} has no meaning here: left out of {n} rows" for key, n in self.ignored_keys.items()]
        return lines


def convert_file(source: Path, target: Path, form: str, images: Path | None = None) -> Conversion:
    """Write the conversations of `source` to `target`, one a line; the file appears when it is whole.

    Args:
        source: `.json`, `.jsonl` or `.parquet`.
        target: the file to write, which must not be there yet.
        form: a key of READERS.
        images: the folder that paths of images start from; the source's own by default. In the new file they start
            from its folder, as this project has it.

    Raises:
        UserError: an unknown format, a target that is there or cannot be written, or not one row that can be converted.
    """
    if form not in READERS:
        raise UserError.single(f"--from {form}", "is no known format", f"known ones: {', '.join(READERS)}")
    if target.exists():
        raise UserError.single(str(target), "is there already", "name a new file; nothing is written over")
    if target.suffix != ".jsonl":
        raise UserError.single(str(target), "one conversation a line is written", "let the name end in .jsonl")
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8") as out:
            conversion = _convert(source, out, form, images or source.parent, target.parent)
        if not conversion.written:
            raise UserError(
                [
                    Problem(str(source), f"not one row could be read as {form}", "see below; is --from right?"),
                    *limit_problems(conversion.left_out, source.name),
                ]
            )
        staged.replace(target)
    except OSError as error:
        raise UserError.single(str(target), f"cannot be written: {error.strerror}", "name another place") from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()
    return conversion


def _convert(source: Path, out: Any, form: str, images: Path, folder: Path) -> Conversion:
    def new_path(path: str) -> str:
        if "://" in path[:10] or path.startswith("data:") or Path(path).is_absolute():
            return path
        return os.path.relpath(images / path, folder)

    written, with_images = 0, 0
    left_out: list[Problem] = []
    missing: list[Problem] = []
    ignored: Counter[str] = Counter()
    for row in iter_rows(source):
        if isinstance(row, Problem):
            left_out.append(row)
            continue
        try:
            if not isinstance(row.value, dict):
                raise UnconvertibleError("a row must be an object")
            read = READERS[form](row.value)
            value = to_row(read, new_path)
            conversation = parse_conversation(RawRow(row.file, row.line, 1, value), _ANY_ROLE, _ANY_NUMBER)
        except UnconvertibleError as error:
            left_out.append(Problem(row.place, error.what, error.fix))
            continue
        except UserError as error:
            left_out += error.problems[:1]
            continue
        ignored.update(key for key in row.value if key not in read.used)
        for path in conversation.images:
            if not (folder / path).is_file():
                fix = "give the folder that the paths start from with --images"
                missing.append(Problem(row.place, f"no such image: {folder / path}", fix))
                break
        out.write(json.dumps(value, ensure_ascii=False) + "\n")
        written += 1
        with_images += bool(conversation.images)
    return Conversion(written, with_images, tuple(left_out), tuple(missing), dict(ignored))
