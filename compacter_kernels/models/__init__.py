"""Compacter in models: those that other libraries have built."""
