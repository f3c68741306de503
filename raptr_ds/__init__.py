"""Random Path Training (RaPTr) of BERT and UL2 on DeepSpeed."""

__version__ = "0.1.0"
