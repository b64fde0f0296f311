"""Conversations to ids and masks: rows a second, memory against the number of rows, and the start from the cache.

    python -m tests.bench.encoding --peer PYTHON

PYTHON is the interpreter of a virtual environment with TRL (`requirements.txt`), whose way of encoding is the peer:
`datasets.map` over single conversations. Each figure is that of a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.measure import ROOT, in_turn, run_process
from tests.bench.result import Ratio, Result, Table, keep

PROCESSES = 2
MODEL_ROWS = 2000
WRITE_ROWS = """
import sys
from pathlib import Path
from tests.bench.workload import make_rows, write_rows
write_rows(Path(sys.argv[1]), make_rows(int(sys.argv[2]), int(sys.argv[3])))
"""


@dataclass(frozen=True)
class Encoded:
    """What one process did.

    Attributes:
        rows: how many it encoded or opened.
        seconds: how long that took, without imports.
        peak_bytes: the most memory that it, or a process that it started, held.
        tokens: how many ids and how many supervised tokens.
    """

    rows: int
    seconds: float
    peak_bytes: int
    tokens: tuple[int, int]

    @property
    def rows_per_second(self) -> float:
        """Conversations a second."""
        return self.rows / self.seconds


def run(command: Sequence[str]) -> Encoded:
    """Run a command that encodes, and return what it says of itself."""
    finished = run_process([*command], {"HF_HUB_OFFLINE": "1"})
    record = json.loads(finished.output.splitlines()[-1])
    tokens = (record["tokens"], record["supervised"])
    return Encoded(record["rows"], record["seconds"], finished.peak_bytes, tokens)


def run_ours(work: Path, name: str, cache: Path | None = None) -> Encoded:
    """Encode a file of the workload into an empty cache, or into a given one."""
    with tempfile.TemporaryDirectory() as empty:
        arguments = [str(work / name), str(work / "model"), str(PROCESSES), str(cache or empty)]
        return run([sys.executable, "-m", "tests.bench.encode_process", *arguments])


def run_peer(python: str, work: Path, name: str) -> Encoded:
    """Encode a file of the workload as TRL does."""
    script = ROOT / "tests" / "bench" / "peers" / "map_encode.py"
    return run([python, str(script), str(work / name), str(work / "model"), str(PROCESSES)])


def write(path: Path, rows: int, turns: int) -> None:
    """Write rows in a process of its own: what this one holds, its children begin with."""
    run_process([sys.executable, "-c", WRITE_ROWS, str(path), str(rows), str(turns)])


def check_same(ours: Encoded, theirs: Encoded) -> None:
    """Check that both found the same tokens. Ends the program where they did not."""
    if ours.tokens != theirs.tokens:
        sys.exit(f"ids and supervised tokens: ours {ours.tokens}, the peer's {theirs.tokens}")


def main(
    *,
    peer: Annotated[str, typer.Option(help="Python of an environment with TRL; without it there is no peer.")] = "",
    rows: Annotated[int, typer.Option(help="Rows of the large file.")] = 200_000,
    rounds: Annotated[int, typer.Option(help="How often each file is encoded.")] = 3,
) -> None:
    """Measure and keep the result."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run_process([sys.executable, "-m", "tests.bench.workload", str(work), str(MODEL_ROWS)])
        for name, count, turns in (("small", rows // 10, 1), ("turns", rows // 40, 4), ("large", rows, 1)):
            write(work / f"{name}.jsonl", count, turns)
        large = [run_ours(work, "large.jsonl", None if again else work / "cache") for again in range(rounds)]
        opened = [run_ours(work, "large.jsonl", work / "cache") for _ in range(rounds)]
        measured = [partial(run_ours, work, "small.jsonl"), partial(run_ours, work, "turns.jsonl")]
        if peer:
            measured += [partial(run_peer, peer, work, "small.jsonl"), partial(run_peer, peer, work, "turns.jsonl")]
        found = in_turn(rounds, *measured)
    _report(rows, large, opened, found)


def _report(rows: int, large: list[Encoded], opened: list[Encoded], found: list[list[Encoded]]) -> None:
    speed = statistics.median(one.rows_per_second for one in large)
    memory = large[0].peak_bytes / statistics.median(one.peak_bytes for one in found[0])
    start = statistics.median(one.seconds for one in opened)
    ratios = [
        Ratio(f"conversations encoded with masks, {rows:,} rows, 2 processes", speed, 1e4, unit="/s"),
        Ratio(f"peak memory of {rows:,} rows / of {rows // 10:,}", memory, 1.1, at_least=False),
        Ratio(f"start from the cache, {rows:,} rows", start, 3.0, at_least=False, unit="s"),
    ]
    names = (f"{rows // 10:,} rows of one turn", f"{rows // 40:,} rows of four turns")
    table: list[list[str | float]] = [[f"{rows:,} rows of one turn", speed, large[0].peak_bytes / 1e6, "", ""]]
    for number, name in enumerate(names):
        ours = found[number]
        line: list[str | float] = [
            name,
            statistics.median(one.rows_per_second for one in ours),
            ours[0].peak_bytes / 1e6,
            "",
            "",
        ]
        if len(found) > number + 2:
            theirs = found[number + 2]
            check_same(ours[0], theirs[0])
            faster = [a.rows_per_second / b.rows_per_second for a, b in zip(ours, theirs, strict=True)]
            line[3:] = [statistics.median(one.rows_per_second for one in theirs), theirs[0].peak_bytes / 1e6]
            ratios.append(Ratio(f"conversations/s / datasets.map as TRL does, {name}", statistics.median(faster)))
        table.append(line)
    columns = ("data", "rows/s", "peak (MB)", "peer: rows/s", "peer: peak (MB)")
    keep(
        Result(
            name="encoding",
            title="Encoding conversations",
            command="python -m tests.bench.encoding --peer PYTHON",
            ratios=ratios,
            tables=[Table(columns, table)],
            notes=[
                "Rows like AdvertiseGen's, about 90 tokens a turn. The seconds are those of `build_dataset` with two "
                "processes and of the report on the data: reading the file, starting the processes, checking, "
                "rendering, tokenizing, masks, writing the cache; imports and loading the tokenizer of the first "
                "process are left out, as they are for the peer.",
                "The start from the cache is the same call where the data was encoded before: the fingerprint of the "
                "data file, opening, and the report.",
                "Ids and supervised tokens are checked to be as many as the peer's.",
                "Each encoding process imports transformers first, which is what small files are slower by.",
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
