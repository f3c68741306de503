"""Ranks, process groups, parallel layers, dropout streams and agreement on what each step does."""
