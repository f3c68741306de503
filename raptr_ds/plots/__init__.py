"""A run's curves and pictures, from its metrics."""
