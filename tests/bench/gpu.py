"""Training on an NVIDIA GPU: throughput, utilisation and memory at the true shapes, with random weights, against TRL.

    python -m tests.bench.gpu [--shape glm-edge-1.5b-chat ...] [--method lora --method full] [--trl-python PYTHON]
    python -m tests.bench.gpu --device cpu --shape nano --steps 6        # all of it on a small shape, to try it out

Each run is a process of its own: `finetune.py` or `finetune_vision.py` in bfloat16 on the workload's rows, or on
photographs of 640 x 480. Without a GPU the command says so and ends with exit code 2.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tests.bench.images import write_data
from tests.bench.measure import ROOT, run_process
from tests.bench.memory_table import MODELS
from tests.bench.result import RESULTS, Ratio, Result, Table, keep
from tests.bench.workload import make_rows, write_rows

EMBEDDED = ROOT / "glm_edge_ft" / "model" / "embedded"
LORA = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
}
# Dense bfloat16 peaks in FLOP/s by a part of the card's name, from NVIDIA's data sheets (without sparsity).
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Runs a script and prints what the card held at most.
WRAPPER = """
import runpy, sys
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    import torch
    print("PEAK", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""
ASK = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Reached:
    """What a run reached: real tokens a second, and the most memory that was allocated, in bytes."""

    tokens_per_second: float
    peak_bytes: float


@dataclass(frozen=True)
class Run:
    """A shape that was trained in one way.

    Attributes:
        shape, method: what was trained.
        flops: FLOP that a real token needs.
        ours, trl: what was reached; None where a run failed or was not wanted.
        wants_trl: whether TRL was to run.
    """

    shape: str
    method: str
    flops: float
    ours: Reached | None
    trl: Reached | None
    wants_trl: bool


def card_name() -> str:
    """Return the GPU's name, or "" where there is none; asked in a process of its own."""
    return subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout.strip()


def peak_flops(card: str) -> float | None:
    """Return the dense bfloat16 peak of a card, in FLOP/s; None for one that is not in the table."""
    words = f" {card} "
    return next((peak for name, peak in PEAKS.items() if f" {name} " in words or f" {name}-" in words), None)


def shape_config(shape: str) -> tuple[Path, dict[str, Any]]:
    """Return the embedded model whose tokenizer is used, and the config of a model of this shape."""
    is_vision = "-v-" in shape or shape == "nano-v"
    source = EMBEDDED / ("glm-edge-v-nano" if is_vision else "glm-edge-nano")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fields = {} if shape.startswith("nano") else MODELS[shape]
    return source, config | {name: value for name, value in fields.items() if not name.endswith("_token_id")}


def write_model(folder: Path, shape: str, device: str) -> tuple[int, dict[str, Any]]:
    """Write a model with random bfloat16 weights; return the weights that every token is multiplied by, and its config.

    Those are the weights of the text part but for the input embeddings.
    """
    import torch
    from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM

    from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
    from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig

    source, fields = shape_config(shape)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        is_vision = "vision_config" in fields
        model: Any = GlmEdgeVForCausalLM(GlmEdgeVConfig(**fields)) if is_vision else GlmForCausalLM(GlmConfig(**fields))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    for name in ("preprocessor_config.json", "generation_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    left_out = ("model.vision.", "model.embed_tokens.")
    weights = sum(value.numel() for name, value in model.named_parameters() if not name.startswith(left_out))
    return weights, fields


def run_ours(work: Path, is_vision: bool, method: str, steps: int, batch: int, device: str) -> Reached:
    """Train with this project's script."""
    training = {
        "output_dir": str(work / "output"),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-5,
        "logging_steps": max(1, steps // 5),
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "bf16": True,
    }
    config = {
        "data_config": {"train_file": "train.jsonl"},
        "max_input_length": 1024,
        "max_output_length": 512,
        **({"freezeV": True} if is_vision else {}),
        **({"peft_config": LORA} if method == "lora" else {}),
        "training_args": training,
    }
    (work / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    script = "finetune_vision.py" if is_vision else "finetune.py"
    command = [sys.executable, "-c", WRAPPER, script, str(work / "data"), str(work / "model"), str(work / "run.yaml")]
    done = run_process(command, {"GLM_EDGE_FT_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"})
    lines = (work / "output" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [event["tokens_per_second"] for event in map(json.loads, lines) if "tokens_per_second" in event]
    return Reached(statistics.median(speeds[1:] or speeds), _peak_of(done.output) or done.peak_bytes)


def run_trl(python: str, work: Path, method: str, steps: int, batch: int, device: str) -> Reached:
    """Train with TRL on the same rows and batch size."""
    script = ROOT / "tests" / "bench" / "peers" / "trl_gpu.py"
    done = run_process(
        [python, str(script), str(work), method, str(steps), str(batch), device], {"HF_HUB_OFFLINE": "1"}
    )
    (line,) = (line for line in done.output.splitlines() if line.startswith("RESULT "))
    record = json.loads(line.removeprefix("RESULT "))
    return Reached(record["tokens_per_second"], record["peak_bytes"] or done.peak_bytes)


def _peak_of(output: str) -> int:
    (line,) = (line for line in output.splitlines() if line.startswith("PEAK "))
    return int(line.removeprefix("PEAK "))


def flops_of_a_token(weights: int, fields: dict[str, Any], method: str, length: float) -> float:
    """Return the FLOP that the text part needs for a token of a row of `length`, recomputation not counted.

    2 a weight forward, 2 backward to the inputs, and 2 to the weights where they are trained; attention: each token
    sees half the row on average, 2 products forward and 4 backward.
    """
    heads = fields["num_attention_heads"] * fields["head_dim"]
    return (6 if method == "full" else 4) * weights + 6 * length * heads * fields["num_hidden_layers"]


def mean_length(cache: Path) -> float:
    """Return the mean tokens of a row of the encoded data."""
    from glm_edge_ft.data.dataset import EncodedDataset

    (meta,) = cache.rglob("meta.json")
    return float(EncodedDataset(meta.parent).lengths.mean())


def say_that_there_is_no_gpu(command: str) -> None:
    """Keep a result without figures, unless there is one already, and end with exit code 2."""
    if not (RESULTS / "gpu.json").exists():
        notes = ["Not measured: no GPU. The command above measures where there is one."]
        keep(Result(name="gpu", title="On a GPU", command=command, notes=notes))
    typer.echo("there is no NVIDIA GPU here; --device cpu --shape nano tries the command out", err=True)
    raise typer.Exit(2)


def main(
    *,
    shape: Annotated[list[str] | None, typer.Option(help="nano, nano-v, or a released model's name.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="lora, full.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 50,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 64,
    trl_python: Annotated[str, typer.Option(help="Interpreter with TRL; none: without it.")] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command out: nothing is kept.")] = "cuda",
) -> None:
    """Measure each shape and way to train, and keep the result."""
    command = "python -m tests.bench.gpu"
    card = card_name() if device == "cuda" else ""
    if device == "cuda" and not card:
        say_that_there_is_no_gpu(command)
    runs: list[Run] = []
    for name in shape or list(MODELS):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            weights, fields = write_model(work / "model", name, device)
            is_vision = "vision_config" in fields
            if is_vision:
                write_data(work / "data", max(64, steps * batch // 4), 64)
            else:
                write_rows(work / "data" / "train.jsonl", make_rows(max(256, steps * batch)))
            for way in method or ["lora", "full"]:
                ours = _attempt(run_ours, work, is_vision, way, steps, batch, device)
                wants_trl = bool(trl_python) and not is_vision
                trl = _attempt(run_trl, trl_python, work, way, steps, batch, device) if wants_trl else None
                flops = flops_of_a_token(weights, fields, way, mean_length(work / "cache")) if ours else 0.0
                runs.append(Run(name, way, flops, ours, trl, wants_trl))
                if device == "cuda":  # after each run: what was measured stays, whatever the next one does
                    keep(_result(runs, card, f"{command} --steps {steps} --batch {batch}"))
    if device != "cuda":
        (table,) = _result(runs, card, command).tables
        typer.echo(json.dumps([dict(zip(table.columns, row, strict=True)) for row in table.rows], indent=1))


def _attempt(run: Callable[..., Reached], *arguments: Any) -> Reached | None:
    """Return what a run reached; None, and say why, where it ended in an error, as for want of memory."""
    try:
        return run(*arguments)
    except SystemExit as end:
        typer.echo(f"{run.__name__}: {end}", err=True)
        return None


def _result(runs: list[Run], card: str, command: str) -> Result:
    peak = peak_flops(card)
    rows: list[tuple[str | float, ...]] = []
    ratios: list[Ratio] = []
    for run in runs:
        used = f"{100 * run.ours.tokens_per_second * run.flops / peak:.1f} %" if peak and run.ours else ""
        rows.append((run.shape, run.method, *_cells(run.ours, used), *(_cells(run.trl) if run.wants_trl else ("", ""))))
        if run.ours and run.trl:
            what = f"{run.shape}, {run.method}"
            speed = run.ours.tokens_per_second / run.trl.tokens_per_second
            ratios.append(Ratio(f"{what}: tokens/s / TRL", speed, 1.0))
            ratios.append(Ratio(f"{what}: peak memory / TRL", run.ours.peak_bytes / run.trl.peak_bytes, 1.0, False))
    columns = ("shape", "trained", "real tokens/s", "of the peak", "peak memory, GiB", "TRL, tokens/s", "TRL, GiB")
    return Result(
        name="gpu",
        title="On a GPU",
        command=command,
        ratios=ratios,
        tables=[Table(columns, rows, title=card)],
        notes=[
            "Random weights of the released shapes, bfloat16, the workload's rows (vision: photographs, the tower "
            "frozen, its vectors kept). The share of the card's dense bfloat16 peak counts 4 FLOP a weight and token "
            "(LoRA) or 6 (full), and attention, without recomputation and without the vision tower; it counts lm_head "
            "and the last layer for every token, also where only supervised ones are computed. Where a run ended in an "
            "error, the table says failed."
        ],
    )


def _cells(reached: Reached | None, *used: str) -> tuple[str | float, ...]:
    """Return the cells of a table for one run: tokens a second, `used`, memory."""
    if reached is None:
        return ("failed", *used, "")
    return (reached.tokens_per_second, *used, reached.peak_bytes / 2**30)


if __name__ == "__main__":
    typer.run(main)
