"""Adapters in a transformers model: adding, switching and removing them."""
