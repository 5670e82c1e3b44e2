"""Adapters in files: the folders of this package, and the checkpoints of other libraries."""
