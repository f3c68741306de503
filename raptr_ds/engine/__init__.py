"""Engines: one narrow protocol over plain torch (the oracle), DeepSpeed's ZeRO and DeepSpeed's pipeline."""
