"""How providers look: one colour for each family of providers, and dashes for its variants."""

from __future__ import annotations

FAMILIES = ("adapters", "bottleneck", "copy", "dense", "factored", "lora", "lokr", "lycoris")
OURS = ("cpu", "triton", "cuda", "module", "compacter_kernels")


def look(provider: str) -> str:
    """Return the CSS classes of a provider."""
    family = "ours" if provider in OURS else next((f for f in FAMILIES if provider.startswith(f)), "other")
    if provider == "module":
        return "ours variant"
    variant = provider not in OURS and provider not in FAMILIES
    return f"{family} variant" if variant else family
