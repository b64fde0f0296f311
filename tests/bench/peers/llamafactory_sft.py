"""LlamaFactory, LoRA on a workload: `llamafactory_sft.py WORKLOAD pad|len|pack STEPS BATCH`."""

import json
import sys
import tempfile
import time
from pathlib import Path

started = time.time()

from counting import count_training, report  # noqa: E402  # the time of imports is measured
from llamafactory.train.tuner import run_exp  # noqa: E402


def main(workload: str, mode: str, steps: int, batch: int) -> None:
    """Train for some steps with LlamaFactory's defaults, but for what the comparison fixes."""
    imported = time.time()
    count_training()
    scratch = Path(tempfile.mkdtemp())
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    dataset = {
        "file_name": f"{workload}/data/train.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {**tags, "system_tag": "system"},
    }
    (scratch / "dataset_info.json").write_text(json.dumps({"workload": dataset}), encoding="utf-8")
    arguments = {
        "model_name_or_path": f"{workload}/model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_target": "q_proj,k_proj,v_proj",
        "dataset_dir": str(scratch),
        "dataset": "workload",
        "template": "glm4",
        "cutoff_len": 1024,
        "overwrite_cache": True,
        "output_dir": str(scratch / "output"),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-4,
        "max_steps": steps,
        "disable_gradient_checkpointing": True,
        "fp16": False,
        "bf16": False,
        "use_cpu": True,
    }
    if mode == "pack":
        arguments |= {"packing": True, "neat_packing": True}
    if mode == "len":
        arguments |= {"train_sampling_strategy": "group_by_length"}
    run_exp(arguments)
    report(started, imported)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
