"""Notebook 03: the LoRA adapter."""
