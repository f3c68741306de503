"""From text to data folders: sources, readers, tokenizer training, encoding, and corpora by name."""
