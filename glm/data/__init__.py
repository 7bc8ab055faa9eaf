"""From text to batches: corpus, tokenizer, shards, blank infilling and the loader."""
