"""Which modules of a model adapters follow, and how wrappers around a model or a module are looked through."""
