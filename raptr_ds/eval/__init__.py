"""Evaluation: what a model is worth, whatever path it was trained along."""
