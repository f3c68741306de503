"""Checkpoints: what a run continues from, written while it trains, restored in any layout."""
