"""Training throughput and peak memory against the peers, and against what the machine multiplies.

    python -m tests.bench.training --peer trl=PYTHON --peer llamafactory=PYTHON --peer swift=PYTHON

PYTHON is the interpreter of a virtual environment with that peer (`requirements.txt`). All train LoRA (r 8 on queries,
keys and values, dropout 0.1) in float32 on the same rows, 16 in a batch, with the same learning rate: each peer as it
comes, and with length grouping switched on; ours as it comes. A peer's two runs, ours and bare matrix products are
processes that run in turn, two seconds each, until all are through (`slices.py`): all meet the same moments of a
machine whose speed is not steady.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.measure import ROOT, run_process
from tests.bench.own_runs import BATCH, Throughput, count_parameters, flops_of, own_run, products_alone
from tests.bench.result import Plot, Ratio, Result, Table, keep
from tests.bench.slices import Measured, Sliced, side_by_side

PEERS = {"trl": "TRL", "llamafactory": "LlamaFactory", "swift": "ms-swift"}
PACKAGES = {"trl": "trl", "llamafactory": "llamafactory", "swift": "ms-swift"}
MODES = {"pad": "as it comes", "len": "length grouping"}
# at least so many times a peer's throughput as it comes
TARGETS = {"trl": 3.0, "llamafactory": 2.5, "swift": 2.5}
# What was measured side by side: a run's name, and what it reached.
Group = dict[str, Throughput]


def peers_own(python: str, peer: str, work: Path, workload: Path, mode: str, steps: int) -> Sliced:
    """Return the run of a peer's script."""
    script = ROOT / "tests" / "bench" / "peers" / f"{peer}_sft.py"
    command = [python, str(script), str(workload), mode, str(steps), str(BATCH)]
    folder = work / f"{peer}_{mode}"
    folder.mkdir()
    return Sliced(command, steps, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}, folder)


def measure(workload: Path, peer: tuple[str, str] | None, steps: int, plain_steps: int) -> Group:
    """Run ours, matrix products alone, and a peer (its name and interpreter) in both ways, side by side."""
    flop_a_token = 4 * count_parameters(workload)  # with LoRA: forwards, and backwards to the inputs
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        own = own_run(work, workload, steps)
        runs = {"ours": own.process, "limit": products_alone(steps)}
        if peer is not None:
            name, python = peer
            runs[f"{name} pad"] = peers_own(python, name, work, workload, "pad", plain_steps)
            runs[f"{name} len"] = peers_own(python, name, work, workload, "len", steps)
        measured = dict(zip(runs, side_by_side(*runs.values()), strict=True))
        reached = own.reached(measured["ours"])
    group = {name: _peers_throughput(run) for name, run in measured.items() if name not in ("ours", "limit")}
    limit = Throughput(flops_of(measured["limit"]) / flop_a_token, measured["limit"].peak_bytes)
    return {"ours": reached, "limit": limit} | group


def _peers_throughput(run: Measured) -> Throughput:
    (line,) = (line for line in run.output.splitlines() if line.startswith("RESULT "))
    record = json.loads(line.removeprefix("RESULT "))
    return Throughput(
        record["real_tokens"] / run.seconds,
        max(record["peak_bytes"], run.peak_bytes),
        record["real_tokens"] / record["slots"],
    )


def version_of(python: str, package: str) -> str:
    """Return the version of a package in another environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return run_process([python, "-c", code]).output.strip()


def ratios_of(groups: Sequence[Group], peers: Mapping[str, str]) -> list[Ratio]:
    """Compare ours with each peer, with the best tuned one and with the limit, each within what ran side by side."""
    found = _by_run(groups)

    def speed_ratio(other: str) -> float:
        pairs = [(group["ours"], group[other]) for group in groups if other in group]
        return statistics.median(own.tokens_per_second / theirs.tokens_per_second for own, theirs in pairs)

    def memory(name: str) -> float:
        return statistics.median(run.peak_bytes for run in found[name])

    ratios = [
        Ratio(f"training throughput / {PEERS[peer]} as it comes", speed_ratio(f"{peer} pad"), TARGETS[peer])
        for peer in peers
    ]
    if peers:
        best = min(speed_ratio(f"{peer} len") for peer in peers)
        ratios.append(Ratio("training throughput / best peer with length grouping", best, 1.25))
    ratios.append(Ratio("training throughput / limit of matrix products", speed_ratio("limit"), 0.6))
    runs = [name for name in found if name.split()[0] in peers]
    if "trl" in peers:
        ratios.append(Ratio("peak memory / TRL", memory("ours") / memory("trl pad"), 0.5, at_least=False))
    if runs:
        leanest = min(memory(name) for name in runs)
        ratios.append(Ratio("peak memory / leanest run of a peer", memory("ours") / leanest, 0.6, at_least=False))
    return ratios


def _by_run(groups: Sequence[Group]) -> dict[str, list[Throughput]]:
    names = dict.fromkeys(name for group in groups for name in group)
    return {name: [group[name] for group in groups if name in group] for name in names}


def table_of(found: Mapping[str, list[Throughput]]) -> Table:
    """Return every run's median and range."""
    rows: list[list[str | float]] = []
    for name, runs in found.items():
        speeds = [run.tokens_per_second for run in runs]
        share = runs[0].real_share
        rows.append(
            [
                _label(name),
                round(statistics.median(speeds)),
                f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                "" if name == "limit" else f"{statistics.median(run.peak_bytes for run in runs) / 1e9:.2f} GB",
                "" if share is None else f"{100 * share:.0f} %",
            ]
        )
    return Table(["run", "real tokens/s, median", "range", "peak memory", "real among all tokens"], rows)


def _label(name: str) -> str:
    own = {"ours": "ours, as it comes", "limit": "matrix products alone"}
    peer, _, mode = name.partition(" ")
    return own.get(name) or f"{PEERS[peer]}, {MODES[mode]}"


def plot_of(found: Mapping[str, list[Throughput]]) -> Plot:
    """Draw the throughput of all runs as bars."""
    series: dict[str, list[tuple[float | str, float]]] = {}
    for name, runs in found.items():
        peer, _, mode = name.partition(" ")
        kind = {"pad": "as it comes", "len": "length grouping"}.get(mode, "as it comes")
        speed = statistics.median(run.tokens_per_second for run in runs)
        series.setdefault(kind, []).append((PEERS.get(peer, {"limit": "matrix products"}.get(peer, peer)), speed))
    return Plot("training", "LoRA on two cores: real tokens per second", "", "real tokens/s", series)


def main(
    *,
    peer: Annotated[list[str] | None, typer.Option(help="NAME=PYTHON, several times.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each run is made.")] = 3,
    rows: Annotated[int, typer.Option(help="Rows of the workload.")] = 4000,
    steps: Annotated[int, typer.Option(help="Steps with length grouping; 50 hold rows of every length.")] = 50,
    plain_steps: Annotated[int, typer.Option(help="Steps of a peer as it comes.")] = 10,
    workload: Annotated[Path | None, typer.Option(help="Folder of a workload that is there already.")] = None,
) -> None:
    """Measure ours, the peers and the limit in turn."""
    peers = dict(entry.split("=", 1) for entry in peer or [])
    with tempfile.TemporaryDirectory() as temporary:
        folder = workload or Path(temporary)
        if workload is None:
            run_process([sys.executable, "-m", "tests.bench.workload", temporary, str(rows)])
        parameters = count_parameters(folder)
        measure(folder, None, 1, 0)  # encodes the rows, so that the cache is there for all
        compared: Sequence[tuple[str, str] | None] = list(peers.items()) if peers else [None]
        groups = [measure(folder, one, steps, plain_steps) for _ in range(rounds) for one in compared]
    found = _by_run(groups)
    keep(
        Result(
            name="training",
            title="Training: throughput and memory",
            command="python -m tests.bench.training "
            + " ".join(f"--peer {name}=PYTHON" for name in peers)
            + f" --rounds {rounds}",
            ratios=ratios_of(groups, peers),
            tables=[table_of(found)],
            plots=[plot_of(found)],
            notes=[
                f"LoRA in float32, {parameters / 1e6:.1f}M parameters, {BATCH} rows in a batch, about 90 tokens a row, "
                f"the longest 405; {steps} steps with length grouping, {plain_steps} of a peer as it comes.",
                "Seconds of the training loop; start-up and preparation of the data are left out for all. Each peer's "
                "two runs, one of ours and matrix products alone ran in turn, two seconds each, until all were "
                "through: all met the same moments of the machine. Each ratio is the median over such groups.",
            ],
            versions={PACKAGES[name]: version_of(python, PACKAGES[name]) for name, python in peers.items()},
        )
    )


if __name__ == "__main__":
    typer.run(main)
