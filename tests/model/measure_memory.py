"""Measures what real training steps take of the machine's memory; started by test_memory.py in a process of its own.

    python -m tests.model.measure_memory CASE [CASE ...]

prints one JSON object: the peak of each case above what the process had before, in bytes. What is measured is the
resident memory (VmHWM, set back before each case through /proc/self/clear_refs): what the system counts when it ends a
process, allocations outside of PyTorch included. With a low MALLOC_MMAP_THRESHOLD_, each large tensor has pages of its
own that go back to the system as it is freed, so that the figure follows the tensors closely.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GlmForCausalLM

from glm_edge_ft.model.activations import BatchShape, StepFormats
from glm_edge_ft.model.adapters import apply_adapter, freeze_vision
from glm_edge_ft.model.fast_layers import fuse_norms, skip_input_cast
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig
from glm_edge_ft.training.loss import install_supervised_loss
from tests.model.vision_fixtures import Shape, released_config
from tests.model_folders import tiny_config

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 16}
FLOAT32 = StepFormats(torch.float32, torch.float32, None, on_gpu=False)
AUTOCAST = StepFormats(torch.float32, torch.float32, torch.bfloat16, on_gpu=False)
FROZEN_16 = StepFormats(torch.bfloat16, torch.float32, torch.bfloat16, on_gpu=False)
SIDE = 672
STEPS = 2  # the second has the optimizer's states from its beginning

# Name → adapter, batch, formats, checkpointing; some 130 MB of weights, in the vision models 200 MB.
CASES: dict[str, tuple[dict[str, Any] | None, BatchShape, StepFormats, bool]] = {
    "full": (None, BatchShape(1, 512, 511), FLOAT32, False),
    "full, 4 rows": (None, BatchShape(4, 512, 1500), FLOAT32, False),
    "full, 4 rows, checkpointing": (None, BatchShape(4, 512, 1500), FLOAT32, True),
    "full, autocast": (None, BatchShape(2, 512, 300), AUTOCAST, False),
    "lora": (LORA, BatchShape(2, 512, 600), FLOAT32, False),
    "lora, checkpointing": (LORA, BatchShape(4, 512, 1500), FLOAT32, True),
    "lora, 16 bit": (LORA, BatchShape(2, 512, 600), FROZEN_16, False),
    "prefix": (PREFIX, BatchShape(2, 512, 600), FLOAT32, False),
    "vision": (None, BatchShape(1, 700, 60, (1, 3, SIDE, SIDE)), FLOAT32, False),
    "vision kept": (LORA, BatchShape(1, 700, 60, (1, 3, SIDE, SIDE)), FLOAT32, False),
}


def build_model(name: str, formats: StepFormats) -> Any:
    """Return the model of a case with random weights, on the device of the context."""
    if name.startswith("vision"):
        shape = Shape(512, 1536, 4, 8, 2, 64, 16384, 512, 1536, 6, 8)
        fields = released_config(shape) | {"tie_word_embeddings": False}
        vision_model: Any = GlmEdgeVForCausalLM(GlmEdgeVConfig(**fields))
        return vision_model.to(formats.frozen)
    widths = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    config = tiny_config(16384, 0, [0], **widths)
    model: Any = GlmForCausalLM(config)
    return model.to(formats.frozen)


def measure(name: str) -> int:
    """Return the peak of two training steps of a case above what the process had before, in bytes."""
    settings, batch, formats, checkpointing = CASES[name]
    gc.collect()
    reset_peak()
    before = memory_status("VmRSS")
    base = build_model(name, formats)
    install_supervised_loss(base)
    fuse_norms(base)
    model: Any = apply_adapter(base, settings)
    if formats.autocast is not None:
        skip_input_cast(model)
    if name == "vision kept":
        freeze_vision(model)
    model.train()
    if checkpointing:
        base.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    inputs = make_batch(batch, vocabulary=base.config.vocab_size, placeholder=getattr(base.model, "placeholder_id", -1))
    if settings is not PREFIX:  # as the trainer leaves it out
        del inputs["attention_mask"]
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=formats.autocast, enabled=formats.autocast is not None):
            loss = model(**inputs, num_items_in_batch=batch.supervised).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
    return memory_status("VmHWM") - before


def make_batch(batch: BatchShape, vocabulary: int, placeholder: int) -> dict[str, torch.Tensor]:
    """Return random ids and pixels; rows after the first are padded, supervised tokens are the last ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary - 100, (batch.rows, batch.length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, -8:] = 0
    labels = torch.full_like(ids, -100)
    places = torch.arange(batch.rows * (batch.length - 1)) >= batch.rows * (batch.length - 1) - batch.supervised
    labels[:, 1:] = torch.where(places.view(batch.rows, -1), ids[:, 1:], labels[:, 1:])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if batch.images is not None:
        ids[0, 2 : 2 + 578] = placeholder
        inputs["pixel_values"] = torch.randn(batch.images, generator=generator)
    return inputs


def reset_peak() -> None:
    """Set VmHWM back to what is resident now (proc(5), /proc/pid/clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory_status(name: str) -> int:
    """Return a figure of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    CASES["warm-up"] = (LORA, BatchShape(1, 16, 8), AUTOCAST, True)  # what libraries allocate once
    measure("warm-up")
    print(json.dumps({name: measure(name) for name in sys.argv[1:]}))
