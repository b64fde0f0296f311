"""ms-swift, LoRA on a workload: `swift_sft.py WORKLOAD pad|len STEPS BATCH`. Its packing needs flash attention."""

import sys
import tempfile
import time

started = time.time()

if __name__ == "__main__":  # its loader starts processes, which import this file anew
    from counting import count_training, report
    from swift.pipelines import sft_main

    imported = time.time()
    count_training()
    workload, mode, steps, batch = sys.argv[1:5]
    arguments = {
        "model": f"{workload}/model",
        "model_type": "glm_edge",
        "tuner_type": "lora",
        "lora_rank": "8",
        "lora_alpha": "32",
        "lora_dropout": "0.1",
        "dataset": f"{workload}/data/train.jsonl",
        "split_dataset_ratio": "0",
        "torch_dtype": "float32",
        "fp16": "false",
        "bf16": "false",
        "max_length": "1024",
        "truncation_strategy": "right",
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": "1",
        "gradient_checkpointing": "false",
        "max_steps": steps,
        "learning_rate": "5e-4",
        "logging_steps": "10",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "dataset_num_proc": "1",
        "dataloader_num_workers": "0",
        "load_from_cache_file": "false",
        "use_cpu": "true",
        "output_dir": tempfile.mkdtemp(),
        "add_version": "false",
    }
    if mode == "len":
        arguments["group_by_length"] = "true"
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    sft_main([*words, "--target_modules", "q_proj", "k_proj", "v_proj"])
    report(started, imported)
