"""Notebook 05: the DPO loss, the trainer, resuming and saving."""
