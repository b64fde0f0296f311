"""What a run reports of itself: the output of `--check`, the lines before training, and `run.json`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.disk import advise_on_disk, describe_disk, disk_facts, estimate_disk
from glm_edge_ft.checks.memory import advise, describe_memory, estimate_run_memory, memory_facts, run_memory_facts
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.distributed import is_main_process
from glm_edge_ft.files import format_bytes, write_text_atomically
from glm_edge_ft.model.weight_files import weights_fingerprint
from glm_edge_ft.training.checkpoints import RUN_RECORD

if TYPE_CHECKING:
    from glm_edge_ft.data.replies import ReplyEnds
    from glm_edge_ft.run import Prepared
    from glm_edge_ft.training.trainer import GlmEdgeTrainer

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "deepspeed", "bitsandbytes")
# This package uses private parts of these; the versions are those of requirements.txt.
TESTED_VERSIONS = {"transformers": "5.24.0", "peft": "0.21.2", "accelerate": "1.15.0"}


def show_check(prepared: Prepared) -> None:
    """Print the report on rank 0; write it as JSON to the path of `--json`."""
    if not is_main_process():
        return
    resume, memory, disk = prepared.plan.resume, estimate_run_memory(prepared), estimate_disk(prepared)
    data = {split: _show_split(prepared, split) for split in prepared.datasets}
    show(f"{describe_model(prepared)}\n{describe_memory(memory)}")
    for notice in advise(memory, prepared):
        show_notice(notice)
    show(describe_disk(disk))
    for line in filter(None, (advise_on_disk(disk), resume.notice)):
        show_notice(line)
    report = {
        "data": data,
        "model": {**model_facts(prepared), "memory_bytes": run_memory_facts(memory)},
        "disk_bytes": disk_facts(disk),
        "resume_from": str(resume.path) if resume.path else None,
    }
    write_json(prepared.plan.request.json_path, report)
    show("check passed: nothing was trained, no weights were read")


def show_preview(prepared: Prepared) -> None:
    """Print the first N training rows token by token; write them as JSON where `--json` says."""
    from glm_edge_ft.data.report import preview, preview_json

    dataset, tokenizer = prepared.datasets["train"], prepared.checkpoint.tokenizer
    rows = [dataset.row(index) for index in range(min(prepared.plan.request.preview or 0, len(dataset)))]
    show(preview(rows, tokenizer, color=sys.stdout.isatty()))
    write_json(prepared.plan.request.json_path, preview_json(rows, tokenizer))


def _show_split(prepared: Prepared, split: str) -> dict[str, Any]:
    from glm_edge_ft.data.replies import count_reply_ends
    from glm_edge_ft.data.report import format_report

    dataset = prepared.datasets[split]
    show(format_report(dataset.report, f"{split}: {prepared.plan.data_files[split]}"))
    replies = count_reply_ends(dataset, prepared.checkpoint.stop_ids)
    show(f"  {describe_replies(replies)}")
    if replies.others:
        show_notice(
            f"{split}: {replies.others:,} learned replies end without a token on which generation stops, first in "
            f"{replies.first_other}: the tuned model would not stop after such a reply"
        )
    return {**dataset.report.to_json(), "replies": replies.to_json()}


def describe_replies(replies: ReplyEnds) -> str:
    """Return one line: how many replies are learned, and how they end."""
    count = f"{'learned replies':<22}{replies.replies:>14,}"
    if replies.stopping == replies.replies:
        return f"{count}   each ends with a token on which generation stops"
    cut = f", {replies.cut:,} were cut by max_output_length" if replies.cut else ""
    return f"{count}   {replies.stopping:,} end with a stop token{cut}"


def describe_model(prepared: Prepared) -> str:
    """Return two lines: the model with what of it is trained, and the memory for it."""
    trainable, total = prepared.parameters
    memory = prepared.memory
    sizes = {"weights": memory.weights, "gradients": memory.gradients, "optimizer states": memory.optimizer}
    sizes |= {name: size for name, size in (("buffers", memory.buffers), ("offloaded", memory.host.total)) if size}
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    quantized = f", {prepared.quantized:,} parameters in 4 bits" if prepared.quantized else ""
    frozen = ", the vision part is frozen" if prepared.keeps_vision else ""
    return (
        f"model: {prepared.plan.location.name}, {total:,} parameters, {trainable:,} of them trained "
        f"({100 * trainable / total:.2f} %{frozen}), {prepared.precision.reason}{quantized}\n"
        f"memory: {format_bytes(memory.total)} for one process ({parts}), and activations"
    )


def model_facts(prepared: Prepared) -> dict[str, Any]:
    """Return parameters, precision, and the estimate of memory without activations, in bytes."""
    trainable, total = prepared.parameters
    return {
        "parameters": total,
        "trainable_parameters": trainable,
        "quantized_parameters": prepared.quantized,
        "precision": prepared.precision.reason,
        "memory_bytes": memory_facts(prepared.memory),
    }


def build_run_record(prepared: Prepared) -> dict[str, Any]:
    """Return what `run.json` holds: resolved config, command line, versions and fingerprints of model and data."""
    plan = prepared.plan
    return {
        "model": plan.location.name,
        "model_fingerprint": weights_fingerprint(plan.location),
        "data_dir": str(plan.request.data_dir),
        "config_file": str(plan.config.path),
        "overrides": list(plan.request.overrides),
        "resumed_from": str(plan.resume.path) if plan.resume.path else None,
        "config": plan.config.resolved(),
        "facts": model_facts(prepared),
        "data": {
            split: {"file": str(path), "fingerprint": dataset.fingerprint, "report": dataset.report.to_json()}
            for split, path in plan.data_files.items()
            if (dataset := prepared.datasets.get(split)) is not None
        },
        "versions": read_versions(),
    }


def describe_computation(trainer: GlmEdgeTrainer, attention: str) -> tuple[dict[str, Any], str]:
    """Return how the run computes, as a fact of the objects that do it: for `run.json`, and as lines to show."""
    import torch

    accelerator = trainer.accelerator
    mixed, plugin = accelerator.mixed_precision, accelerator.state.deepspeed_plugin
    engine = "plain" if accelerator.num_processes == 1 else "DDP"
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in trainer.model.parameters()})
    if plugin:
        engine = f"DeepSpeed, ZeRO-{plugin.zero_stage}" if plugin.zero_stage else "DeepSpeed, ZeRO off"
        dtypes = [{"bf16": "bfloat16", "fp16": "float16"}.get(mixed, "float32")]  # it casts all weights
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" or torch.get_float32_matmul_precision() != "highest"
    facts = {
        "precision": "fp32" if mixed == "no" else mixed,
        "weights": dtypes,
        "tf32": accelerator.device.type == "cuda" and is_tf32,
        "engine": engine,
        "world_size": accelerator.num_processes,
        "device": "cpu" if accelerator.device.type == "cpu" else str(accelerator.device),
        "compile": accelerator.state.dynamo_plugin.backend.value.lower(),
        "attention": attention,
    }
    tf32 = ", products in tf32" if facts["tf32"] else ""
    compiled = "" if facts["compile"] == "no" else f", compiled by {facts['compile']}"
    lines = (
        f"computes in {facts['precision']}{tf32}, weights in {' and '.join(dtypes)}, on {facts['device']}, "
        f"world_size {facts['world_size']} ({engine}){compiled}\nattention: {attention}"
    )
    return facts, lines


def write_run_record(record: Mapping[str, Any], folder: Path) -> None:
    """Write `run.json` on rank 0: into the output folder, and into each checkpoint."""
    if is_main_process():
        write_text_atomically(folder / RUN_RECORD, _to_json(record))


def write_json(path: Path | None, content: Any) -> None:
    """Write JSON on rank 0; with no path, do nothing."""
    if path is None or not is_main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_to_json(content), encoding="utf-8")  # not renamed into place: it may be /dev/stdout


def _to_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n"


def read_versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that are installed, by name."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def note_untested_versions(installed: Mapping[str, str] | None = None) -> str:
    """Return one line for libraries that are installed (by default: here) in other versions than the tested ones."""
    installed = read_versions() if installed is None else installed
    others = [
        f"{name} {installed.get(name, 'none')} instead of {version}"
        for name, version in TESTED_VERSIONS.items()
        if installed.get(name) != version
    ]
    return (
        f"{', '.join(others)}: not tested together; pip install -r requirements.txt installs the tested ones"
        if others
        else ""
    )
