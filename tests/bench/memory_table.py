"""The tables of configs/README.md: what the released models need, for each way to train and to share, as Markdown.

    python -m tests.bench.memory_table                  # all four models, some two minutes
    python -m tests.bench.memory_table glm-edge-1.5b-chat

A step has one row of 2,048 tokens, all of them supervised, with activation checkpointing, in bfloat16 on a GPU; in
vision models one of its images. LoRA is that of `configs/lora.yaml`, the shipped DeepSpeed files are used as they are.
The sizes are those of the released checkpoints; no weights are read.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge_ft.checks.memory import USABLE_OF_GPU, step_formats
from glm_edge_ft.model.precision import Precision

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LENGTH = 2048
CARDS = (24, 40, 80)  # GiB, as cards are sold
MANY = 8

_COMMON = {
    "vocab_size": 59264,
    "head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 59246,
    "eos_token_id": 59246,
}
_SMALL = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_LARGE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "num_key_value_heads": 6,
}
_VISION = {
    "boi_token_id": 59256,
    "eoi_token_id": 59257,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 672,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "glm-edge-1.5b-chat": _COMMON | _SMALL,
    "glm-edge-4b-chat": _COMMON | _LARGE,
    "glm-edge-v-2b": _COMMON | _SMALL | _VISION,
    "glm-edge-v-5b": _COMMON | _LARGE | _VISION,
}
# Heading → processes and the DeepSpeed file in configs/.
WAYS: dict[str, tuple[int, str | None]] = {
    "1 GPU": (1, None),
    "1 GPU, ZeRO-2 offload": (1, "ds_zero_2_offload.json"),
    "1 GPU, ZeRO-3 offload": (1, "ds_zero_3_offload.json"),
    "8 GPUs": (MANY, None),
    "8 GPUs, ZeRO-2": (MANY, "ds_zero_2.json"),
    "8 GPUs, ZeRO-3": (MANY, "ds_zero_3.json"),
    "8 GPUs, ZeRO-2 offload": (MANY, "ds_zero_2_offload.json"),
    "8 GPUs, ZeRO-3 offload": (MANY, "ds_zero_3_offload.json"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model, method: what is trained, and how.
        gpu: bytes on each GPU, by the headings of `WAYS`.
        host: bytes of the machine's memory that offloading takes in all, by file; the same on one GPU and on eight.
    """

    model: str
    method: str
    gpu: dict[str, int]
    host: dict[str, int]


def build_released_model(name: str) -> Any:
    """Return a released model's structure on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, GlmConfig

    from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
    from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig

    fields = MODELS[name]
    with torch.device("meta"):
        if "vision_config" in fields:
            return GlmEdgeVForCausalLM(GlmEdgeVConfig(**fields))
        return AutoModelForCausalLM.from_config(GlmConfig(**fields))


def estimate_row(name: str, method: str) -> Row:
    """Return the line of a model for the method `LoRA` or `full`."""
    from glm_edge_ft.config import load_config
    from glm_edge_ft.config.deepspeed import complete_deepspeed
    from glm_edge_ft.model.activations import BatchShape, trace_step
    from glm_edge_ft.model.adapters import wrap_meta_model
    from glm_edge_ft.model.memory import estimate_memory, measure_size, read_sharding
    from glm_edge_ft.training.loss import install_supervised_loss

    settings = load_config(CONFIGS / "lora.yaml").peft_config if method == "LoRA" else None
    weights = "bfloat16" if settings else "float32"  # as precision.choose_precision
    images = (1, 3, 672, 672) if "vision_config" in MODELS[name] else None
    batch = BatchShape(rows=1, length=LENGTH, supervised=LENGTH - 1, images=images)
    estimates = {}
    for stage in (0, 2, 3):
        shared = stage > 0
        model = wrap_meta_model(settings, build_released_model(name))
        size = measure_size(model)
        formats = step_formats(Precision(weights, bf16=True, fp16=False, reason=""), shared, on_gpu=True)
        install_loss = functools.partial(install_supervised_loss, gradients_in_forward=stage < 3)
        trace = trace_step(model, batch, formats, install_loss, checkpointing={})
        for heading, (processes, file) in WAYS.items():
            if stage == _stage(heading):
                content = json.loads((CONFIGS / file).read_text(encoding="utf-8")) if file else None
                if content is not None:
                    content = complete_deepspeed(content, has_gpu=True, bf16=True, fp16=False)
                sharding = read_sharding(content, processes, MODELS[name]["hidden_size"])
                dtype = "bfloat16" if shared else weights
                estimates[heading] = estimate_memory(size, dtype, sharding, trace)
    return Row(
        model=name,
        method=method,
        gpu={heading: estimates[heading].total for heading in WAYS},
        host={stage: estimates[f"1 GPU, {stage} offload"].host.total for stage in ("ZeRO-2", "ZeRO-3")},
    )


def _stage(heading: str) -> int:
    """Return the stage of ZeRO that a column is about, 0 for none."""
    return next((stage for stage in (2, 3) if f"ZeRO-{stage}" in heading), 0)


def format_need(size: int) -> str:
    """Return a GPU's bytes as GB, and the smallest of the usual cards that holds them, with 10 % of it left free."""
    card = next((card for card in CARDS if size <= USABLE_OF_GPU * card * 2**30), None)
    return f"{size / 1e9:.1f} ({f'{card}' if card else '–'})"


def format_table(rows: Iterable[Row]) -> str:
    """Return the lines as Markdown: one table for a single GPU and one for eight."""
    rows = list(rows)
    blocks = []
    for gpus in ("1 GPU", "8 GPUs"):
        headings = [heading for heading in WAYS if heading.startswith(gpus)]
        titles = ["model", "", *(heading.removeprefix(f"{gpus}, ") for heading in headings)]
        titles += [f"RAM, {stage} offload" for stage in ("ZeRO-2", "ZeRO-3")] if gpus == "1 GPU" else []
        lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)]]
        for row in rows:
            cells = [row.model, row.method, *(format_need(row.gpu[heading]) for heading in headings)]
            cells += [f"{size / 1e9:.1f}" for size in row.host.values()] if gpus == "1 GPU" else []
            lines.append(cells)
        blocks.append("\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    names = sys.argv[1:] or list(MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        sys.exit(f"{unknown[0]}: not among the released models; write one of {', '.join(MODELS)}")
    print(format_table(estimate_row(name, method) for name in names for method in ("LoRA", "full")))
