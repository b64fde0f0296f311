"""TRL's SFTTrainer in bfloat16 on a folder's model and rows: `trl_gpu.py WORK lora|full STEPS BATCH cuda|cpu`."""

import json
import sys
import tempfile
import time

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl_template import TEMPLATE


class Clock(TrainerCallback):
    """Counts seconds from the end of the first fifth of the steps."""

    def __init__(self, first: int) -> None:
        self.first, self.start, self.tokens = first, 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Start the clock."""
        if state.global_step == self.first:
            self.start, self.tokens = time.perf_counter(), state.num_input_tokens_seen


def main(work: str, method: str, steps: int, batch: int, device: str) -> None:
    """Train for some steps with TRL's defaults, but for what the comparison fixes."""
    clock = Clock(max(1, steps // 5))
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        assistant_only_loss=True,
        max_length=1536,
        report_to=[],
        save_strategy="no",
        use_cpu=device == "cpu",
        bf16=True,
        learning_rate=1e-5,
        gradient_checkpointing=False,
        include_num_input_tokens_seen="non_padding",
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    tokenizer = AutoTokenizer.from_pretrained(f"{work}/model")
    tokenizer.chat_template = TEMPLATE
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            f"{work}/model", dtype=torch.bfloat16 if method == "lora" else torch.float32
        ),
        args=arguments,
        train_dataset=load_dataset("json", data_files=f"{work}/data/train.jsonl", split="train"),
        processing_class=tokenizer,
        peft_config=lora if method == "lora" else None,
        callbacks=[clock],
    )
    trainer.train()
    seconds = time.perf_counter() - clock.start
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    speed = (trainer.state.num_input_tokens_seen - clock.tokens) / seconds
    print("RESULT " + json.dumps({"tokens_per_second": float(speed), "peak_bytes": peak}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
