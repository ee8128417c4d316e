"""Notebook 04: preference pairs, read, checked, encoded and stored."""
