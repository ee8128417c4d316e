"""Notebook 02: tokenizer and base model, in 4 bits."""
