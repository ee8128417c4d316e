"""Align a language model with Direct Preference Optimization on one GPU, or on none."""

__version__ = "0.1.0"
