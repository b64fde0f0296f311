"""Encodes rows as TRL does for `assistant_only_loss`: `datasets.map`, a conversation at a time, with the masks.

    PYTHON map_encode.py DATA_FILE MODEL PROCESSES

prints one line of JSON: rows, seconds from opening the file to the last encoded row, and ids and supervised tokens.
"""

import json
import sys
import tempfile
import time

from datasets import load_dataset
from transformers import AutoTokenizer

TEMPLATE = (  # renders as the model's does, and marks what the assistant writes: up to the token that ends its turn
    "{% for item in messages %}{% if item['role'] == 'user' %}{% if loop.first %}<|user|>{% endif %}"
    "{{ '\\n' + item['content'] }}{% elif item['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ '\\n' + item['content'] }}<|user|>{% endgeneration %}{% endif %}{% endfor %}"
)


def encode(row, tokenizer):  # type: ignore[no-untyped-def]
    """Return ids and mask of a row."""
    return tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )


def main() -> None:
    """Encode and report."""
    path, model, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        rows = load_dataset("json", data_files=path, split="train", cache_dir=cache)
        encoded = rows.map(
            encode, fn_kwargs={"tokenizer": tokenizer}, num_proc=processes, remove_columns=rows.column_names
        )
        seconds = time.perf_counter() - start
        tokens, supervised = sum(map(len, encoded["input_ids"])), sum(map(sum, encoded["assistant_masks"]))
    print(json.dumps({"rows": len(encoded), "seconds": seconds, "tokens": tokens, "supervised": supervised}))


if __name__ == "__main__":
    main()
