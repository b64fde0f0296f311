"""One of two ranks that pass a row each, of very different numbers of supervised tokens, through a small model.

Started by torchrun from `test_collectives.py`: losses and gradients of both together are held against those that this
process alone gets from both rows in one batch. Arguments: the file for what was found, and the cases, each a pair of a
mode and a kind, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from glm_edge_ft import IGNORE_INDEX
from glm_edge_ft.model.adapters import apply_adapter, generate
from glm_edge_ft.model.fast_layers import fuse_norms
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig
from glm_edge_ft.training.loss import install_supervised_loss
from tests.model_folders import tiny_config, tiny_model

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "init_lora_weights": False}
KINDS: dict[str, dict[str, Any] | None] = {
    "lora": {**LORA, "target_modules": ["q_proj", "down_proj"]},
    "lora-head": {**LORA, "target_modules": ["q_proj", "lm_head"]},
    "head-alone": {**LORA, "target_modules": ["lm_head"]},
    "saved-head": {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "full": None,
    "lora-recomputed": {**LORA, "target_modules": ["q_proj", "down_proj", "lm_head"]},
    "full-recomputed": None,
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    "vision-lora": {**LORA, "target_modules": ["q_proj", "v_proj"]},
    "vision-tower": {**LORA, "target_modules": ["fc1", "fc2"]},
    "vision-full": None,
}
# Supervised tokens of each rank's row: around the 512 of a chunk of the loss, and none.
COUNTS = ((849, 90), (512, 513), (0, 1030), (40, 0), (0, 0))
PLACEHOLDER, PLACEHOLDERS, SIDE = 290, 18, 112


def build(kind: str) -> Any:
    """Return a small model, the same in each call, without dropout."""
    if kind.startswith("vision"):
        text = {**tiny_config(300, 0, [1, 2]).to_diff_dict(), "architectures": None}
        tower = {"hidden_size": 24, "image_size": SIDE, "intermediate_size": 40, "num_attention_heads": 2}
        tower |= {"num_channels": 3, "num_hidden_layers": 2, "patch_size": 14}
        torch.manual_seed(0)
        config = GlmEdgeVConfig(**text, vision_config=tower, boi_token_id=PLACEHOLDER, eoi_token_id=PLACEHOLDER + 1)
        base: Any = GlmEdgeVForCausalLM(config)
    else:
        base = tiny_model()
    install_supervised_loss(base)
    fuse_norms(base)
    torch.manual_seed(1)
    model = apply_adapter(base, KINDS[kind]).train()
    if kind.endswith("recomputed"):  # as `activation_checkpointing` does
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_rows(kind: str, counts: tuple[int, int], image_on: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the row of each rank, and all rows in one batch; `image_on` is the rank whose row has an image."""
    generator = torch.Generator().manual_seed(0)
    question = 24
    rows: list[dict[str, Any]] = []
    for rank, count in enumerate(counts):
        ids = torch.randint(5, 280, (1, question + count), generator=generator)
        labels = ids.clone()
        labels[:, :question] = IGNORE_INDEX
        row: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        if kind.startswith("vision") and rank == image_on:
            ids[:, 2 : 2 + PLACEHOLDERS] = PLACEHOLDER
            row["pixel_values"] = torch.randn(1, 3, SIDE, SIDE, generator=generator)
        rows.append(row)
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        name: torch.cat(
            [torch.nn.functional.pad(row[name], (0, longest - row[name].shape[1]), value=by) for row in rows]
        )
        for name, by in (("input_ids", 0), ("labels", IGNORE_INDEX), ("attention_mask", 0))
    }
    return rows, batch | {name: row[name] for row in rows for name in row if name == "pixel_values"}


def start_engine(mode: str, model: Any) -> Any:
    """Return the model as the ranks train it together."""
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    import deepspeed

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=settings_of(mode), model_parameters=trained
    )
    return engine


def settings_of(mode: str) -> dict[str, Any]:
    """Return the DeepSpeed settings of a mode; under ZeRO-3 each weight, however small, is shared."""
    zero = {"stage": int(mode[-1]), "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def gradients_of(mode: str, model: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of each trained weight, whole; 0 where it got none."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            gradient = weight.grad if mode == "ddp" else safe_get_full_grad(weight)
            found[name] = torch.zeros(weight.shape) if gradient is None else gradient.detach().clone()
    return found


def compare(mode: str, alone: Any, engine: Any, kind: str, counts: tuple[int, int], image_on: int) -> dict[str, float]:
    """Return how far the group's loss, evaluated loss and gradients are from those of one process, `alone`.

    Losses are compared with their size, gradients with the largest of the model.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows, batch = make_rows(kind, counts, image_on)
    divisor = max(1, sum(counts))
    alone.zero_grad()
    expected = alone(**batch, num_items_in_batch=divisor).loss
    expected.backward()
    wanted = {name: weight.grad for name, weight in alone.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        evaluated = engine(**rows[rank], num_items_in_batch=divisor).loss.clone()
    loss = engine(**rows[rank], num_items_in_batch=divisor).loss * ranks
    if mode == "ddp":
        loss.backward()
    else:
        engine.backward(loss)
    found = gradients_of(mode, engine.module)
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values()) or 1.0
    sums = torch.stack([loss.detach() / ranks, evaluated.float()])
    torch.distributed.all_reduce(sums)
    if mode == "ddp":
        engine.zero_grad()
    else:
        engine.step()  # at a rate of 0
    size = abs(float(expected)) or 1.0
    return {
        "loss": abs(float(sums[0]) - float(expected)) / size,
        "evaluated": abs(float(sums[1]) - float(expected)) / size,
        "gradients": max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / largest,
    }


def compare_replies(alone: Any, engine: Any, kind: str, image_on: int) -> dict[str, float]:
    """Return how many tokens of this process's replies are not those of `alone`, by the way that they are made.

    Prompts and replies of the ranks have other lengths. Each way needs all ranks as long as one of them is not done.
    """
    rank = torch.distributed.get_rank()
    rows, _ = make_rows(kind, (5, 60), image_on)
    prompt = {name: values for name, values in rows[rank].items() if name != "labels"}
    wrong = {}
    for name, options in (("greedy", {}), ("beams", {"num_beams": 2}), ("no cache", {"use_cache": False})):
        config = GenerationConfig(max_new_tokens=(4, 9)[rank], eos_token_id=1, pad_token_id=0, **options)
        replies = [generate(model.eval(), **prompt, generation_config=config) for model in (engine.module, alone)]
        wrong[name] = float("inf") if replies[0].shape != replies[1].shape else float((replies[0] != replies[1]).sum())
    return wrong


def main() -> None:
    """Go through all cases and write what was found."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    found: dict[str, dict[str, float]] = {}
    for mode, kind in json.loads(sys.argv[2]):
        alone = build(kind)
        known = HfDeepSpeedConfig(settings_of(mode)) if mode != "ddp" else None  # the vision model asks for the stage
        engine = start_engine(mode, build(kind))
        for number, counts in enumerate(COUNTS):
            found[f"{mode} {kind} {counts}"] = compare(mode, alone, engine, kind, counts, image_on=number % 2)
        if mode == "zero3":
            for image_on in (0, 1):
                found[f"{mode} {kind} replies {image_on}"] = compare_replies(alone, engine, kind, image_on)
        del engine, known
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
