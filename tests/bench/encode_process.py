"""Encodes a data file, or opens what was encoded, in a process of its own; started by `tests.bench.encoding`.

    python -m tests.bench.encode_process DATA_FILE MODEL PROCESSES CACHE

prints one line of JSON: rows, seconds of `build_dataset` with the report on the data, and how many ids and supervised
tokens it found. Imports, and loading the tokenizer, come before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Encode and report."""
    from transformers import AutoTokenizer

    from data.embedded.layout import STOP_TOKENS
    from glm_edge_ft.data.dataset import build_dataset
    from glm_edge_ft.data.encoding import ConversationEncoder

    path, model, processes, cache = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    tokenizer = AutoTokenizer.from_pretrained(model)
    stop_ids: Any = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    encoder = ConversationEncoder(tokenizer, stop_ids, 2048, 2048)
    start = time.perf_counter()
    dataset, _ = build_dataset([path], encoder, processes, cache, progress=False)
    report = dataset.report
    seconds = time.perf_counter() - start
    record = {"tokens": report.tokens, "supervised": report.supervised_tokens}
    print(json.dumps({"rows": report.rows, "seconds": seconds, **record}))


if __name__ == "__main__":  # worker processes import this module, and do nothing then
    main()
