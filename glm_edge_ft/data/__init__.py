"""From data files to batches: rows, conversations, token ids with loss masks, the cached dataset."""
