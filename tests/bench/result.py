"""What a measurement found, how it is kept, and the page that shows all that is kept.

python -m tests.bench.result        renders RESULTS.md and its pictures anew from results/*.json
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
PAGE = FOLDER / "RESULTS.md"
# In this order they stand on the page; a result of another name comes last.
ORDER = (
    "training",
    "step_profile",
    "fast_layers",
    "loss",
    "encoding",
    "startup",
    "vision",
    "images",
    "generation",
    "metrics",
    "growth",
    "levers",
    "gpu",
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers")


def describe_machine() -> str:
    """Return processor, number of CPUs and memory of this machine in one line."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line for line in cpu_info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cpus} CPUs, {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


@dataclass(frozen=True)
class Ratio:
    """One figure that is compared with a target.

    Attributes:
        what: what is compared with what.
        value: the measured figure.
        target: the figure to reach; None: there is none.
        at_least: whether `value` is to be at least `target`, or at most.
        unit: what the figure counts; "×" for a ratio.
    """

    what: str
    value: float
    target: float | None = None
    at_least: bool = True
    unit: str = "×"

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True)
class Table:
    """A table of the page: column names, and rows of texts or numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture of the page: bars where `x` has names, else lines.

    Attributes:
        name: of its file.
        title, x_label, y_label: texts of the picture, in English.
        series: for each line or group of bars, its points `(x, y)`.
        log_x: whether the x axis is logarithmic.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float | str, float]]]
    log_x: bool = False


@dataclass(frozen=True)
class Result:
    """What one command measured.

    Attributes:
        name: of the module and of the file that it is kept in.
        title: heading on the page.
        command: what was run, to be run again.
        ratios, tables, plots: what it found.
        notes: sentences that say how it was measured, and why a target is missed.
        versions: packages besides this project's own, such as peers.
        machine: where it was measured; by default this machine.
    """

    name: str
    title: str
    command: str
    ratios: Sequence[Ratio] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = field(default_factory=describe_machine)


def installed(*names: str) -> dict[str, str]:
    """Return the versions of packages that are installed here."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor(record: Mapping[str, Any]) -> str:
    """Return the name of the processor that a record was measured on."""
    return str(record["machine"]).partition(",")[0]


def keep(result: Result) -> None:
    """Print a result, keep it and render the page; what another processor measured is kept beside it."""
    record = asdict(result) | {"versions": installed(*PACKAGES) | dict(result.versions)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result.name}.json"
    if path.exists() and processor(before := json.loads(path.read_text(encoding="utf-8"))) != processor(record):
        suffix = re.sub(r"[^a-z0-9]+", "-", processor(before).lower()).strip("-")
        for plot in before["plots"]:
            plot["name"] += f"-{suffix}"
        path.with_stem(f"{result.name}-{suffix}").write_text(_as_json(before), encoding="utf-8")
    path.write_text(_as_json(record), encoding="utf-8")
    print(_section(record))
    render()


def render() -> None:
    """Write `RESULTS.md` and its pictures from all results that are kept."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    records.sort(key=lambda record: (ORDER.index(record["name"]) if record["name"] in ORDER else 99, record["name"]))
    summary = [
        f"{_ratio_line(ratio)} {processor(record)} |"
        for record in records
        for ratio in record["ratios"]
        if ratio["target"] is not None
    ]
    head = [
        "# What it costs, and what others cost",
        "",
        "Measured by the commands below, each figure in the same run as what it is compared with; rendered by "
        "`python -m tests.bench.result`. Ratios carry over to other machines, seconds do not. Peers have virtual "
        "environments of their own: `tests/bench/requirements.txt` has their versions.",
        "",
        "| what | measured | target | | processor |",
        "|---|---|---|---|---|",
        *summary,
    ]
    for record in records:
        for plot in record["plots"]:
            _draw(plot)
    text = "\n".join(head) + "\n" + "".join("\n" + _section(record) for record in records)
    PAGE.write_text(text, encoding="utf-8")


def _as_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _ratio_line(ratio: Mapping[str, Any]) -> str:
    made = Ratio(**ratio)
    unit = "" if made.unit == "×" else " "
    target = "" if made.target is None else ("at least " if made.at_least else "at most ")
    target += "" if made.target is None else f"{_number(made.target)}{unit}{made.unit}"
    met = {True: "met", False: "**missed**", None: ""}[made.is_met]
    return f"| {made.what} | {_number(made.value)}{unit}{made.unit} | {target} | {met} |"


def _section(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [f"## {record['title']}", "", f"`{record['command']}`", "", f"{record['machine']}; {versions}.", ""]
    if record["ratios"]:
        lines += ["| what | measured | target | |", "|---|---|---|---|"]
        lines += [*(_ratio_line(ratio) for ratio in record["ratios"]), ""]
    for table in record["tables"]:
        lines += [table["title"], ""] if table["title"] else []
        lines += ["| " + " | ".join(table["columns"]) + " |", "|" + "---|" * len(table["columns"])]
        lines += ["| " + " | ".join(_number(value) for value in row) + " |" for row in table["rows"]]
        lines.append("")
    lines += [line for plot in record["plots"] for line in (f"![{plot['title']}](results/{plot['name']}.png)", "")]
    lines += [f"- {note}" for note in record["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _draw(plot: Mapping[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2))
    points = [point for series in plot["series"].values() for point in series]
    if points and isinstance(points[0][0], str):
        names = list(dict.fromkeys(name for name, _ in points))
        width = 0.8 / len(plot["series"])
        for number, (label, series) in enumerate(plot["series"].items()):
            places = [names.index(name) + (number - (len(plot["series"]) - 1) / 2) * width for name, _ in series]
            bars = axes.bar(places, [value for _, value in series], width * 0.92, label=label)
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.set_xticks(range(len(names)), names)
    else:
        for label, series in plot["series"].items():
            axes.plot([x for x, _ in series], [y for _, y in series], marker="o", label=label)
        axes.set_ylim(bottom=0)
        if plot["log_x"]:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for x, _ in points})
            axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set(title=plot["title"], xlabel=plot["x_label"], ylabel=plot["y_label"])
    axes.grid(axis="y", alpha=0.3)
    if len(plot["series"]) > 1:
        axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{plot['name']}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    render()
