"""Adapters in files: folders of our own, and checkpoints of other libraries in both directions."""
