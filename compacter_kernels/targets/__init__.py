"""Which modules of a model get an adapter or a trained copy, and how to look inside wrappers."""
