"""Comparisons of methods: planned, run, resumed, reported."""
