"""Notebook 01: what this machine is and what it holds."""
