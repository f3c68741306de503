"""From data folders to batches: tokenizer, indexed tokens, objectives, and the loader."""
