"""Notebook 06: what changed, and how sure that is."""
