"""How what was put into a model is known again: by the name of the child that holds it, and by its type."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from compacter_kernels.config import CompacterConfig

NAME = "compacter"  # of the child of the model, and of each module that serves adapters


class Added:
    """What `inject` puts into a model, told from modules of the base by this type."""

    def forward(self, x: Any) -> Any:
        """As a step of an nn.Sequential, beside whose modules it stands, it does nothing."""
        return x


class Adapters(Protocol):
    """What the child of an adapted model offers to whoever saves or converts its adapters."""

    configs: dict[str, CompacterConfig]
    active: str | None

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The tensors of the adapters of that name, by their names in a file."""
        ...


def adapters_of(model: nn.Module | None) -> Adapters | None:
    """The adapters of a model without wrappers, or None."""
    here: Any = getattr(model, NAME, None)
    if not (isinstance(here, Added) and hasattr(here, "configs")):
        return None
    return here  # type: ignore[return-value]
