"""Text to batches: tokenizer, corpora, indexed tokens, objectives, and a loader that is a pure function of the step."""
