"""Modules that transformers 5 names otherwise than transformers 4."""

from __future__ import annotations

from collections.abc import Container

# Parts of names in version 4 and in version 5, of all models of the table together.
_PAIRS = (
    ("encoder.layer.", "layers."),  # ViT
    ("attention.output.dense", "attention.o_proj"),
    ("output.dense", "mlp.fc2"),
)


def name_in(names: Container[str], name: str) -> str:
    """The name that a module has in a model of these names, whatever the version of transformers.

    A name that no version has there comes back as it is.
    """
    later, earlier = name, name
    for old, new in _PAIRS:
        later = later.replace(old, new)
    for old, new in reversed(_PAIRS):
        earlier = earlier.replace(new, old)
    return next((other for other in (name, later, earlier) if other in names), name)
