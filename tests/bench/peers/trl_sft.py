"""TRL's SFTTrainer, LoRA on a workload: `trl_sft.py WORKLOAD pad|len|pack STEPS BATCH`."""

import sys
import tempfile
import time

started = time.time()

import torch  # noqa: E402  # the time of imports is measured
from counting import count_training, report  # noqa: E402
from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl_template import TEMPLATE  # noqa: E402


def main(workload: str, mode: str, steps: int, batch: int) -> None:
    """Train for some steps with TRL's defaults, but for what the comparison fixes."""
    imported = time.time()
    count_training()
    tokenizer = AutoTokenizer.from_pretrained(f"{workload}/model")
    tokenizer.chat_template = TEMPLATE
    options = {"train_sampling_strategy": "group_by_length"} if mode == "len" else {}
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        assistant_only_loss=True,
        max_length=1024,
        report_to=[],
        logging_steps=10,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        learning_rate=5e-4,
        gradient_checkpointing=False,
        packing=mode == "pack",
        **options,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{workload}/model", dtype=torch.float32),
        args=arguments,
        train_dataset=load_dataset("json", data_files=f"{workload}/data/train.jsonl", split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"]
        ),
    )
    trainer.train()
    report(started, imported)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
