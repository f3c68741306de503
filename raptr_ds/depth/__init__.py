"""A trained model at any depth: its layers chosen, its loss measured, and what it predicts."""
