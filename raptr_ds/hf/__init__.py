"""Weights and tokenizers to Hugging Face."""
