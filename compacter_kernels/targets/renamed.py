"""Names of modules in another class of a family, and in another version of transformers."""

from __future__ import annotations

from collections.abc import Container

# Parts of names in version 4 and in version 5, of all models of the table together.
_PAIRS = (
    ("encoder.layer.", "layers."),  # ViT
    ("attention.output.dense", "attention.o_proj"),
    ("output.dense", "mlp.fc2"),
)


def name_in(names: Container[str], name: str, base: str = "") -> str:
    """The name that a module has in a model of these names; the given one if it has none there.

    It may come from another class of the family, with or without the child that is the base, and
    from another version of transformers. base: the name of that child, such as `bert`.
    """
    later, earlier = name, name
    for old, new in _PAIRS:
        later = later.replace(old, new)
    for old, new in reversed(_PAIRS):
        earlier = earlier.replace(new, old)
    versions = (name, later, earlier)
    others = (*(v.removeprefix(f"{base}.") for v in versions), *(f"{base}.{v}" for v in versions)) if base else ()
    return next((other for other in (*versions, *others) if other in names), name)
