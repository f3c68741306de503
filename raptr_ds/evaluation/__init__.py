"""Downstream tasks of lm-evaluation-harness, scored on a prefix language model as the prefix language model it is."""
