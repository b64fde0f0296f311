"""What a run says and writes about itself: its model in two lines, and `run.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.memory import memory_facts
from glm_edge_ft.checks.versions import read_versions
from glm_edge_ft.console import is_main_process
from glm_edge_ft.files import format_bytes, write_text_atomically
from glm_edge_ft.model.weight_files import weights_fingerprint
from glm_edge_ft.training.checkpoints import RUN_RECORD

if TYPE_CHECKING:
    from glm_edge_ft.run import Prepared
    from glm_edge_ft.training.trainer import GlmEdgeTrainer


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
        "data": {split: _data_facts(prepared, split) for split in prepared.datasets},
        "versions": read_versions(),
    }


def computed(trainer: GlmEdgeTrainer, attention: str) -> dict[str, Any]:
    """Return how a run computes, as the objects that do it say, whatever config and environment asked for."""
    import torch

    accelerator = trainer.accelerator
    mixed, plugin = accelerator.mixed_precision, accelerator.state.deepspeed_plugin
    engine = "plain" if accelerator.num_processes == 1 else "DDP"
    formats = sorted({str(weight.dtype).removeprefix("torch.") for weight in trainer.model.parameters()})
    if plugin:
        engine = f"DeepSpeed, ZeRO-{plugin.zero_stage}" if plugin.zero_stage else "DeepSpeed, ZeRO off"
        formats = [{"bf16": "bfloat16", "fp16": "float16"}.get(mixed, "float32")]  # so it casts all that computes
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" or torch.get_float32_matmul_precision() != "highest"
    return {
        "precision": "fp32" if mixed == "no" else mixed,
        "weights": formats,
        "tf32": accelerator.device.type == "cuda" and is_tf32,
        "engine": engine,
        "world_size": accelerator.num_processes,
        "device": "cpu" if accelerator.device.type == "cpu" else str(accelerator.device),
        "compile": accelerator.state.dynamo_plugin.backend.value.lower(),
        "attention": attention,
    }


def describe_computing(facts: Mapping[str, Any]) -> str:
    """Return the lines that a run shows of `computed`."""
    tf32 = ", products in tf32" if facts["tf32"] else ""
    compiled = "" if facts["compile"] == "no" else f", compiled by {facts['compile']}"
    return (
        f"computes in {facts['precision']}{tf32}, weights in {' and '.join(facts['weights'])}, on {facts['device']}, "
        f"world_size {facts['world_size']} ({facts['engine']}){compiled}\nattention: {facts['attention']}"
    )


def write_run_record(record: dict[str, Any], folder: Path) -> None:
    """Write `run.json` on rank 0: into the output folder, and into each checkpoint."""
    if is_main_process():
        write_text_atomically(folder / RUN_RECORD, json_text(record))


def _data_facts(prepared: Prepared, split: str) -> dict[str, Any]:
    dataset = prepared.datasets[split]
    return {
        "file": str(prepared.plan.data_files[split]),
        "fingerprint": dataset.fingerprint,
        "report": dataset.report.to_json(),
    }


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


def describe_model(prepared: Prepared) -> str:
    """Return the two lines that a run shows of its model before it trains: what is trained, and the memory for it."""
    trainable, total = prepared.parameters
    memory = prepared.memory
    named = {"weights": memory.weights, "gradients": memory.gradients, "optimizer states": memory.optimizer}
    named |= {name: size for name, size in (("buffers", memory.buffers), ("offloaded", memory.host.total)) if size}
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in named.items())
    quantized = f", {prepared.quantized:,} parameters in 4 bits" if prepared.quantized else ""
    frozen = ", the vision part stays as it is" if prepared.keeps_vision else ""
    return (
        f"model: {prepared.plan.location.name}, {total:,} parameters, {trainable:,} of them trained "
        f"({100 * trainable / total:.2f} %{frozen}), {prepared.precision.reason}{quantized}\n"
        f"memory: {format_bytes(memory.total)} for one process ({parts}), and activations"
    )


def run_title(prepared: Prepared) -> str:
    """Return the title of the curve."""
    peft = prepared.plan.config.peft_config
    return f"{prepared.plan.location.name}, {peft['peft_type'] if peft else 'full fine-tuning'}"


def write_json(path: Path | None, content: Any) -> None:
    """Write JSON on rank 0; with no path, do nothing."""
    if path is None or not is_main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(content), encoding="utf-8")  # not renamed into place: it may be /dev/stdout


def json_text(content: Any) -> str:
    """Return the content of a JSON file for people."""
    return json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n"
