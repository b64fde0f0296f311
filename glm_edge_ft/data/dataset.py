"""Data files → the encoded, memory-mapped, cached data set.

Rows stream in chunks from the files through worker processes into a cache folder (`cache.py`), in order. A second run
with the same files, tokenizer, template, stop tokens and budgets opens that folder and encodes nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from glm_edge_ft import IGNORE_INDEX
from glm_edge_ft.data import cache
from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.data.images import resolve
from glm_edge_ft.data.prompts import PromptSample, encode_prompts
from glm_edge_ft.data.report import DataReport, build_report
from glm_edge_ft.data.rows import MAXIMUM_PROBLEMS_SHOWN, file_problem, iter_rows, limit_problems
from glm_edge_ft.data.workers import EncodedChunk, chunks_of, clamp_processes, encode_in_order
from glm_edge_ft.errors import Problem, UserError

FORMAT_VERSION = 4  # raise it whenever a change of this package changes ids, masks or records
_PLACES_SHOWN = 5
_NOTES_SHOWN = 50  # more kinds of remarks than this come from keys that are different in each row


class EncodedDataset:
    """A map-style data set over a cache folder; small to pickle, each process opens the files for itself."""

    def __init__(self, folder: Path) -> None:
        """Open a whole cache folder. Raises FileNotFoundError if it is not there or not whole."""
        meta = cache.read_meta(folder)
        if meta is None:
            raise FileNotFoundError(f"no encoded data in {folder}")
        self.folder = folder
        self.meta = meta
        self._kept: NDArray[np.int64] | None = None
        self._open()

    def _open(self) -> None:
        self._ids = cache.open_array(self.folder / cache.IDS_FILE, np.int32)
        self._mask = cache.open_array(self.folder / cache.MASK_FILE, np.bool_)
        self.rows_info: NDArray[Any] = cache.open_array(self.folder / cache.ROWS_FILE, cache.ROW_RECORD)
        if self.has_images:
            self._image_paths = cache.open_array(self.folder / cache.IMAGE_PATHS_FILE, np.uint8)
            self._image_ends = cache.open_array(self.folder / cache.IMAGE_ENDS_FILE, np.int64)
        if self._kept is not None:
            self.rows_info = self.rows_info[self._kept]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "meta": self.meta, "_kept": self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows_info)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `input_ids` and `labels` of a row, (length,) int64; labels are -100 where nothing is supervised.

        Vision data also has `images`: where the images are whose placeholders are in the row, in their order.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        record = self.rows_info[index]
        place = slice(int(record["start"]), int(record["start"]) + int(record["length"]))
        input_ids = self._ids[place].astype(np.int64)
        labels = np.where(self._mask[place], input_ids, IGNORE_INDEX)
        sample: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        if self.has_images:
            sample["images"] = self.images(index)
        return sample

    @property
    def fingerprint(self) -> str:
        """What the rows, and how they are encoded, are known by: the cache key, and which rows are left out of it."""
        if self._kept is None:
            return self.folder.name
        return f"{self.folder.name}-{len(self)}-{hashlib.sha256(self._kept.tobytes()).hexdigest()[:8]}"

    @property
    def has_images(self) -> bool:
        """Whether this is vision data."""
        return self.meta.get("image_folders") is not None

    def images(self, index: int) -> tuple[str, ...]:
        """Return where the images of a row are, resolved against the folder of its data file."""
        number = range(len(self))[index] if self._kept is None else int(self._kept[index])
        start = int(self._image_ends[number - 1]) if number else 0
        paths = cache.unpack_paths(self._image_paths[start : int(self._image_ends[number])].tobytes())
        folder = Path(self.meta["image_folders"][int(self.rows_info[index]["file"])])
        return tuple(resolve(path, folder) for path in paths)

    def place(self, index: int) -> str:
        """Return `file:line` of a row."""
        record = self.rows_info[index]
        return f"{self.meta['files'][int(record['file'])]}:{int(record['line'])}"

    def row(self, index: int) -> dict[str, Any]:
        """Return what `dataset[index]` returns, with `file` and `line`."""
        record = self.rows_info[index]
        return {"file": self.meta["files"][int(record["file"])], "line": int(record["line"]), **self[index]}

    def without(self, dropped: Mapping[int, str]) -> EncodedDataset:
        """Return the data set without some rows, each given with why it is left out; the report counts them."""
        numbers = np.arange(len(self)) if self._kept is None else self._kept
        places = [f"{self.place(index)}: {reason}" for index, reason in dropped.items()]
        smaller = EncodedDataset(self.folder)
        smaller._kept = np.delete(numbers, list(dropped))
        smaller.meta = {
            **self.meta,
            "dropped_rows": self.meta["dropped_rows"] + len(places),
            "dropped": [*self.meta["dropped"], *places][:MAXIMUM_PROBLEMS_SHOWN],
        }
        smaller._open()
        return smaller

    def tokens(self, first: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and loss mask of the file's tokens from `first` to before `end`: views, nothing is read yet."""
        return self._ids[first:end], self._mask[first:end]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(rows,) tokens of each row, for batches by length."""
        return np.array(self.rows_info["length"])

    @property
    def report(self) -> DataReport:
        """What the data holds, in numbers."""
        return build_report(
            self.rows_info,
            **{
                key: self.meta[key]
                for key in ("dropped_rows", "dropped", "control_text_rows", "control_text", "notices")
            },
        )


def build_dataset(
    paths: Sequence[Path],
    encoder: ConversationEncoder,
    num_proc: int = 1,
    cache_dir: Path | None = None,
    progress: bool = True,
    find_bad_images: Callable[[EncodedDataset, list[tuple[str, str]]], list[Problem]] | None = None,
) -> tuple[EncodedDataset, list[str]]:
    """Encode data files, or open what an earlier run encoded, and return it with notices for the user.

    Args:
        paths: `.jsonl`, `.json` or `.parquet` files, used one after another.
        encoder: encodes a conversation.
        num_proc: most processes to encode with.
        cache_dir: where encoded data is kept; `cache.default_cache_dir()` by default.
        progress: whether a bar on stderr shows how far it is.
        find_bad_images: opens the images of the rows where some are wrong, so that both are said at once; it gets the
            good rows, and place and path of the images of the others.

    Raises:
        UserError: rows that cannot be read or are no conversations, up to 20 of each file; or no row is left.
    """
    names = cache.display_names(paths)
    folder = dataset_folder(paths, encoder, cache_dir)
    notices: list[str] = []
    if cache.read_meta(folder) is not None:
        return EncodedDataset(folder), [f"{', '.join(names)}: encoded data taken from {folder}"]
    processes, notice = clamp_processes(num_proc, cache.total_size(paths))
    notices += [notice] if notice else []
    with cache.CacheWriter(folder, with_images=encoder.takes_images) as writer:
        findings = _Findings(names)
        _encode_files(paths, findings, encoder, processes, writer, progress=progress)
        meta = {**findings.to_meta(), "image_folders": _image_folders(paths, encoder)}
        if any(findings.problems.values()) and find_bad_images is not None:
            writer.close(meta)
            findings.add_problems(find_bad_images(EncodedDataset(writer.part), findings.claimed))
        findings.raise_if_unusable(writer.rows)
        writer.finish(meta)
    return EncodedDataset(folder), notices


def dataset_folder(paths: Sequence[Path], encoder: ConversationEncoder, cache_dir: Path | None = None) -> Path:
    """Return where the encoded rows of data files lie, or will lie. Raises UserError for a file that cannot be read."""
    names = cache.display_names(paths)
    _check_readable(paths, names)
    return (cache_dir or cache.default_cache_dir()) / dataset_key(paths, names, encoder)


def open_if_whole(folder: Path) -> EncodedDataset | None:
    """Return the data set in a cache folder, or None as long as it is not there or not whole."""
    return EncodedDataset(folder) if cache.read_meta(folder) is not None else None


def load_prompts(paths: Sequence[Path], encoder: ConversationEncoder, limit: int | None = None) -> list[PromptSample]:
    """Return the evaluation samples of data files: one for each supervised assistant turn.

    Raises:
        UserError: rows that cannot be read or are no conversations, up to 20 of each file.
    """
    samples: list[PromptSample] = []
    problems: list[Problem] = []
    for path, name in zip(paths, cache.display_names(paths), strict=True):
        bad: list[Problem] = []
        for row in iter_rows(path, name):
            try:
                if isinstance(row, Problem):
                    raise UserError([row])
                samples += encode_prompts(encoder, encoder.parse(row), path.absolute().parent)
            except UserError as error:
                bad += error.problems
            if limit is not None and len(samples) >= limit:
                break
        problems += limit_problems(bad, name)
    if problems:
        raise UserError(problems)
    return samples[:limit]


def dataset_key(paths: Sequence[Path], names: Sequence[str], encoder: ConversationEncoder) -> str:
    """Return the cache key: it changes with everything that changes the ids, the masks or the names in the report."""
    import jinja2
    import tokenizers
    import transformers

    template = encoder.template
    sources = [template.source, template.source_with_tools]
    return cache.cache_key(
        {
            "format": FORMAT_VERSION,
            "kind": "vision" if encoder.takes_images else "chat",
            "versions": [transformers.__version__, tokenizers.__version__, jinja2.__version__, np.__version__],
            "files": [[name, cache.content_hash(path)] for name, path in zip(names, paths, strict=True)],
            "suffixes": [path.suffix.lower() for path in paths],
            "tokenizer": encoder.tokenizer.backend.to_str(),
            "control_as_text": encoder.tokenizer.backend.encode_special_tokens,
            "template": sources,
            "special_tokens": template.special_tokens,
            "date": str(datetime.date.today()) if any("strftime" in source for source in sources) else None,
            "stop_ids": sorted(encoder.reply_format.stop_ids),
            "stop_id": encoder.reply_format.stop_id,
            "budgets": [encoder.budgets.max_input_length, encoder.budgets.max_output_length],
            "images": None if encoder.images is None else astuple(encoder.images),
            "image_folders": _image_folders(paths, encoder),
        }
    )


def _image_folders(paths: Sequence[Path], encoder: ConversationEncoder) -> list[str] | None:
    # What image paths are relative to, for each file; None in chat fine-tuning.
    return [str(path.absolute().parent) for path in paths] if encoder.takes_images else None


def _check_readable(paths: Sequence[Path], names: Sequence[str]) -> None:
    found = [file_problem(path, name) for path, name in zip(paths, names, strict=True)]
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise UserError(problems)


@dataclass
class _Findings:
    """What is noted about all rows while they are encoded; bounded, however many rows are bad."""

    names: Sequence[str]
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    claimed: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: list[str] = field(default_factory=list)
    control_text: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def add(self, file: int, chunk: EncodedChunk, folder: Path) -> None:
        """Take over what was noted in a chunk of a file, which lies in `folder`."""
        claimed = [(place, resolve(path, folder)) for place, path in chunk.claimed]
        self.claimed += claimed[: MAXIMUM_PROBLEMS_SHOWN * len(self.names) - len(self.claimed)]
        self._add_problems(self.names[file], chunk.problems)
        self.dropped += chunk.dropped[: MAXIMUM_PROBLEMS_SHOWN - len(self.dropped)]
        self.control_text += chunk.control_text[: _PLACES_SHOWN - len(self.control_text)]
        self.counts["dropped"] += len(chunk.dropped)
        self.counts["control_text"] += len(chunk.control_text)
        self.notes.update(chunk.notes)

    def add_problems(self, problems: Sequence[Problem]) -> None:
        """Take over what is wrong with rows of any file, each named by `file:line`."""
        for name in self.names:
            self._add_problems(name, [problem for problem in problems if problem.where.startswith(f"{name}:")])

    def _add_problems(self, name: str, problems: Sequence[Problem]) -> None:
        def line(problem: Problem) -> int:
            found = re.match(r":(\d+)", problem.where[len(name) :])
            return int(found[1]) if found else 0

        known = self.problems.get(name, [])
        self.problems[name] = sorted([*known, *problems], key=line)[:MAXIMUM_PROBLEMS_SHOWN]
        self.counts[f"problems of {name}"] += len(problems)

    def raise_if_unusable(self, rows: int) -> None:
        """Raise UserError where rows are wrong, or where none of them is left."""
        problems = [problem for of_file in self.problems.values() for problem in of_file]
        for name in self.names:
            more = self.counts[f"problems of {name}"] - MAXIMUM_PROBLEMS_SHOWN
            if more > 0:
                problems.append(Problem(name, f"... and {more} more"))
        if not problems and rows == 0:
            what = f"all {self.counts['dropped']} rows are dropped: none leaves anything to learn within the budgets"
            fix = "raise max_input_length or max_output_length"
            problems.append(Problem(", ".join(self.names), what, fix))
            problems += [Problem(*place.split(": ", 1)) for place in self.dropped]
        if problems:
            raise UserError(problems)

    def to_meta(self) -> dict[str, Any]:
        """Return what is stored beside the rows."""
        return {
            "files": list(self.names),
            "dropped_rows": self.counts["dropped"],
            "dropped": self.dropped,
            "control_text_rows": self.counts["control_text"],
            "control_text": self.control_text,
            "notices": self.remarks
            + [
                f"{text} ({count} row{'s' if count > 1 else ''})"
                for text, count in sorted(self.notes.most_common(_NOTES_SHOWN))
            ]
            + [f"... and {more} more remarks on keys" for more in [len(self.notes) - _NOTES_SHOWN] if more > 0],
        }


def _encode_files(
    paths: Sequence[Path],
    findings: _Findings,
    encoder: ConversationEncoder,
    processes: int,
    writer: cache.CacheWriter,
    *,
    progress: bool,
) -> None:
    names = findings.names
    rows = (iter_rows(path, name, findings.remarks.append) for path, name in zip(paths, names, strict=True))
    jobs = ((file, chunk) for file, rows_of_file in enumerate(rows) for chunk in chunks_of(rows_of_file))
    with tqdm(desc=f"encoding {', '.join(names)}", unit=" rows", mininterval=0.5, disable=not progress) as bar:
        for file, chunk in encode_in_order(jobs, encoder, processes):
            findings.add(file, chunk, paths[file].absolute().parent)
            chunk.records["file"] = file
            writer.append(chunk.ids, chunk.mask, chunk.records, chunk.images)
            bar.update(chunk.rows)
