"""Measures what loading and training take in each of several processes; started by test_memory.py, under torchrun too.

    python -m tests.model.measure_sharing MODEL_FOLDER DEEPSPEED_JSON_OR_- OUT_FOLDER

writes OUT_FOLDER/RANK.json: `loading` and `training`, the highest resident memory of each above what the process had
before it loaded, in bytes. Weights are read as a run reads them, and the Trainer takes two optimizer steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from glm_edge_ft.config.deepspeed import complete_deepspeed, read_deepspeed
from glm_edge_ft.model.activations import BatchShape
from glm_edge_ft.model.loading import load_weights, locate_model, read_checkpoint
from glm_edge_ft.training.deepspeed import init_deepspeed
from glm_edge_ft.training.loss import install_supervised_loss
from tests.model.measure_memory import make_batch, memory_status, reset_peak

BATCH = BatchShape(rows=1, length=128, supervised=127)


def measure(model_folder: str, deepspeed_file: str, output: Path) -> dict[str, int]:
    """Return the two peaks of this process."""
    settings: Any = None
    if deepspeed_file != "-":
        settings = complete_deepspeed(read_deepspeed(deepspeed_file), has_gpu=False, bf16=False, fp16=False)
    args = Seq2SeqTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        deepspeed=settings,
        max_steps=2,
        per_device_train_batch_size=BATCH.rows,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if settings is None:
        import deepspeed.comm  # noqa: F401  # so that all processes have imported the same
    else:
        init_deepspeed()
    checkpoint = read_checkpoint(locate_model(model_folder))
    reset_peak()
    before = memory_status("VmRSS")
    model: Any = load_weights(checkpoint, torch.float32)
    loading = memory_status("VmHWM") - before
    reset_peak()
    install_supervised_loss(model)
    batch = {name: values[0] for name, values in make_batch(BATCH, model.config.vocab_size, placeholder=-1).items()}
    Seq2SeqTrainer(model=model, args=args, train_dataset=[batch] * 8).train()
    return {"loading": loading, "training": memory_status("VmHWM") - before}


if __name__ == "__main__":
    folder = Path(sys.argv[3])
    result = measure(sys.argv[1], sys.argv[2], folder / "trainer")
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
