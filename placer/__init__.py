"""Decides where the experts of a Mixture-of-Experts model live: solves, predicts, measures and exports placements."""

__all__ = ["__version__"]

__version__ = "0.1.0"
