"""The models: pre-norm transformers that execute a path of their layers."""
