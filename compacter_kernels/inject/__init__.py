"""Putting Compacter adapters into a transformers model, switching between them, and taking them out again."""
