"""Text to data folders: sources, readers, tokenizer training, encoding, corpora by name."""
