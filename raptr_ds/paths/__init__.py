"""Paths: the value, the methods that choose one for each step, and what a path costs. NumPy at most."""

from raptr_ds.paths.methods import build_path_method
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.schedule import Phase

__all__ = ["LayerPath", "PathMethod", "Phase", "build_path_method"]
