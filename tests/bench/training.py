"""Training throughput and peak memory against the peers, and against what the machine multiplies.

    python -m tests.bench.training --peer trl=PYTHON --peer llamafactory=PYTHON --peer swift=PYTHON

PYTHON is the interpreter of a virtual environment with that peer (`requirements.txt`). All train LoRA (r 8 on queries,
keys and values, dropout 0.1) in float32 on the same rows, 16 in a batch, with the same learning rate: each peer as it
comes, and with length grouping switched on; ours as it comes. Each run is a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tests.bench.measure import ROOT, in_turn, run_process
from tests.bench.result import Plot, Ratio, Result, Table, keep

BATCH = 16
PEERS = {"trl": "TRL", "llamafactory": "LlamaFactory", "swift": "ms-swift"}
PACKAGES = {"trl": "trl", "llamafactory": "llamafactory", "swift": "ms-swift"}
MODES = {"pad": "as it comes", "len": "length grouping"}
# at least so many times a peer's throughput as it comes
TARGETS = {"trl": 3.0, "llamafactory": 2.5, "swift": 2.5}
CONFIG: dict[str, Any] = {
    "data_config": {"train_file": "train.jsonl"},
    "max_input_length": 512,
    "max_output_length": 512,
    "training_args": {
        "learning_rate": 5e-4,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "include_num_input_tokens_seen": "non_padding",
    },
    "peft_config": {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    },
}
LIMIT = """
import statistics, time, torch
left, right = torch.randn(2048, 512), torch.randn(512, 3072)
seconds = []
for _ in range(60):
    start = time.perf_counter()
    for _ in range(10):
        left @ right
    seconds.append(time.perf_counter() - start)
print(10 * 2 * 2048 * 512 * 3072 / statistics.median(seconds))
"""


@dataclass(frozen=True)
class Throughput:
    """What one run reached.

    Attributes:
        tokens_per_second: real (non-pad) tokens over the seconds of the training loop.
        peak_bytes: the most memory that the process held.
        real_share: real tokens among all that went through the model; None: not counted.
    """

    tokens_per_second: float
    peak_bytes: float
    real_share: float | None = None


def run_ours(workload: Path, steps: int) -> Throughput:
    """Train with this project's script."""
    with tempfile.TemporaryDirectory() as work:
        training = CONFIG["training_args"] | {"output_dir": f"{work}/output", "max_steps": steps}
        config = Path(work) / "run.yaml"
        config.write_text(yaml.safe_dump(CONFIG | {"training_args": training}), encoding="utf-8")
        command = [sys.executable, "finetune.py", str(workload / "data"), str(workload / "model"), str(config)]
        finished = run_process(command, {"GLM_EDGE_FT_CACHE": f"{workload}/cache", "HF_HUB_OFFLINE": "1"})
        lines = (Path(work) / "output" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    tokens = max(event.get("num_input_tokens_seen", 0) for event in events)
    seconds = max(event.get("train_runtime", 0.0) for event in events)
    return Throughput(tokens / seconds, finished.peak_bytes)


def run_peer(python: str, peer: str, workload: Path, mode: str, steps: int) -> Throughput:
    """Train with a peer's script."""
    script = ROOT / "tests" / "bench" / "peers" / f"{peer}_sft.py"
    command = [python, str(script), str(workload), mode, str(steps), str(BATCH)]
    with tempfile.TemporaryDirectory() as work:
        finished = run_process(command, {"HF_HUB_OFFLINE": "1", "HF_HOME": work}, Path(work))
    (line,) = (line for line in finished.output.splitlines() if line.startswith("RESULT "))
    record = json.loads(line.removeprefix("RESULT "))
    return Throughput(
        record["real_tokens"] / record["train_seconds"],
        max(record["peak_bytes"], finished.peak_bytes),
        record["real_tokens"] / record["slots"],
    )


def run_limit(parameters: int) -> Throughput:
    """Return the tokens per second that matrix products alone would allow: 4 FLOP a parameter and token with LoRA."""
    finished = run_process([sys.executable, "-c", LIMIT])
    return Throughput(float(finished.output) / (4 * parameters), finished.peak_bytes)


def count_parameters(workload: Path) -> int:
    """Return the number of weights of the workload's model, from the headers of its files."""
    total = 0
    for path in (workload / "model").glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        for shape in shapes:
            count = 1
            for size in shape:
                count *= size
            total += count
    return total


def version_of(python: str, package: str) -> str:
    """Return the version of a package in another environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return run_process([python, "-c", code]).output.strip()


def ratios_of(found: Mapping[str, list[Throughput]], peers: Mapping[str, str]) -> list[Ratio]:
    """Compare ours with each peer, with the best tuned one and with the limit, round by round."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    def speed_ratio(other: str) -> float:
        pairs = zip(found["ours"], found[other], strict=True)
        return median([ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs])

    def memory(name: str) -> float:
        return median([run.peak_bytes for run in found[name]])

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
        runs = {"ours": partial(run_ours, folder, steps), "limit": partial(run_limit, parameters)}
        for name, python in peers.items():
            runs[f"{name} pad"] = partial(run_peer, python, name, folder, "pad", plain_steps)
            runs[f"{name} len"] = partial(run_peer, python, name, folder, "len", steps)
        run_ours(folder, 1)  # encodes the rows, so that the cache is there for all rounds
        found = dict(zip(runs, in_turn(rounds, *runs.values()), strict=True))
    keep(
        Result(
            name="training",
            title="Training: throughput and memory",
            command="python -m tests.bench.training "
            + " ".join(f"--peer {name}=PYTHON" for name in peers)
            + f" --rounds {rounds}",
            ratios=ratios_of(found, peers),
            tables=[table_of(found)],
            plots=[plot_of(found)],
            notes=[
                f"LoRA in float32, {parameters / 1e6:.1f}M parameters, {BATCH} rows in a batch, about 90 tokens a row, "
                f"the longest 405; {steps} steps with length grouping, {plain_steps} of a peer as it comes.",
                "Seconds of the training loop; start-up and preparation of the data are left out for all.",
                "Matrix products: the median of 60 measurements over a quarter of a minute, since a run, too, goes "
                "through the machine's slow moments.",
            ],
            versions={PACKAGES[name]: version_of(python, PACKAGES[name]) for name, python in peers.items()},
        )
    )


if __name__ == "__main__":
    typer.run(main)
