"""Whole models: adapters into transformers, faster adapters in the models of other libraries, checkpoints."""
