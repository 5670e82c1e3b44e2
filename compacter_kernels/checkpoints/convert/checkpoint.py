"""A checkpoint between two formats: adapters by the module they follow, what they share, what trained beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.config import DTYPES, CompacterConfig
from compacter_kernels.nn import CompacterAdapter

POSITIONS = ("down", "up")
RULES = ("phm_rule", "phm_rule_left", "phm_rule_right")
FACTORS = ("W_left", "W_right", "W")


class MissingRuleError(ValueError):
    """A checkpoint that lacks weights which its adapters share."""


@dataclass
class Checkpoint:
    """What every format holds in its own way.

    adapters: the name of the module that an adapter follows -> its tensors by our names (`down.W_left`, `up.b`, ...),
    those that it shares left out. shared: as `compacter_kernels.inject.shared` names them. copies: trained layer norms
    and heads, by the names of the base's parameters. losses: what the target cannot hold, and the result is without.
    """

    adapters: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    @property
    def config(self) -> CompacterConfig:
        """The options, checked.

        Raises:
            ValueError: options that do not fit.
        """
        try:
            return CompacterConfig.from_dict(self.options)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def whole(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each adapter with all its tensors, the shared ones too."""
        for place, own in self.adapters.items():
            yield place, {**own, **dict(borrowed(self.shared))}

    def check(self) -> None:
        """Raise ValueError unless the tensors of each adapter are those that the options ask for."""
        config = self.config
        if not self.adapters:
            raise ValueError("there are no adapters in it")
        for place, tensors in self.whole():
            if "down.W_left" not in tensors and "down.W" not in tensors:
                raise ValueError(f"the adapter of {place} has no W_left and no W; it has {', '.join(sorted(tensors))}")
            try:
                expected = _expected(tensors, config)
            except ValueError as error:
                raise ValueError(f"the adapter of {place}: {error}") from error
            for name in sorted(expected.keys() | tensors.keys()):
                found, wanted = (None if t is None else tuple(t.shape) for t in (tensors.get(name), expected.get(name)))
                if found is None or wanted is None:
                    what = "missing" if found is None else "one more than the options ask for"
                    raise ValueError(f"{name} of {place} is {what}")
                if found != wanted:
                    raise ValueError(f"{name} of {place} has shape {found}, and must have {wanted} by the options")
                if tensors[name].dtype not in DTYPES.values():
                    raise ValueError(f"{name} of {place} is {tensors[name].dtype}, not {' or '.join(DTYPES)}")


def _expected(tensors: dict[str, Tensor], config: CompacterConfig) -> dict[str, Tensor]:
    """The parameters that an adapter of these widths has by the options, on meta.

    Raises:
        ValueError: the options make no such adapter.
    """
    hidden, bottleneck = sizes(tensors)
    given = config.reduction_factor
    if isinstance(given, int | float) and hidden // given != bottleneck:
        raise ValueError(f"reduction_factor={given} does not make {bottleneck} of {hidden}")
    try:
        reduction = factor(hidden, bottleneck)
        adapter = CompacterAdapter(hidden, reduction_factor=reduction, device="meta", **config.of_each_adapter())
    except (TypeError, RuntimeError, OverflowError) as error:  # sizes that no tensor has
        raise ValueError(f"the options ask for what cannot be built: {str(error).splitlines()[0]}") from error
    return dict(adapter.named_parameters())


def borrowed(shared: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Shared tensors under the names that each adapter has them by: phm_rule is down.phm_rule and up.phm_rule."""
    for name, tensor in shared.items():
        for position in POSITIONS:
            if name in RULES:
                yield f"{position}.{name}", tensor
            elif name.startswith(f"W_{position}"):
                yield f"{position}.{name.replace(f'W_{position}', 'W')}", tensor


def share(adapters: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Take out of the adapters what is the same in all of them, and give it once."""
    shared: dict[str, Tensor] = {}
    everything = list(adapters.values())
    rules = [name for name in RULES if f"down.{name}" in everything[0]]
    if rules and all(_same(a.get(f"{p}.{name}") for a in everything for p in POSITIONS) for name in rules):
        shared |= {name: everything[0][f"down.{name}"] for name in rules}
    factors = [(p, name) for p in POSITIONS for name in FACTORS if f"{p}.{name}" in everything[0]]
    if len(everything) > 1 and all(_same(a.get(f"{p}.{name}") for a in everything) for p, name in factors):
        shared |= {name.replace("W", f"W_{p}"): everything[0][f"{p}.{name}"] for p, name in factors}
    taken = {name for name, _ in borrowed(shared)}
    for adapter in everything:
        for name in taken:
            del adapter[name]
    return shared


def _same(tensors: Iterable[Tensor | None]) -> bool:
    first, *others = tensors
    return first is not None and all(other is not None and torch.equal(first, other) for other in others)


def sizes(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Hidden size and bottleneck of an adapter.

    Raises:
        ValueError: weights that are not of three dimensions.
    """
    left = tensors["down.W_left"] if "down.W_left" in tensors else tensors["down.W"]
    right = tensors.get("down.W_right", left)
    if left.dim() != 3 or right.dim() != 3:
        raise ValueError(f"W of a PHM layer has three dimensions, got {tuple(left.shape)} and {tuple(right.shape)}")
    return left.shape[0] * left.shape[1], right.shape[0] * right.shape[2]


def factor(hidden: int, bottleneck: int) -> float:
    """The reduction factor that gives this bottleneck."""
    if bottleneck and hidden % bottleneck == 0:
        return hidden // bottleneck
    exact = hidden / max(bottleneck, 1)
    return exact if int(hidden // exact) == bottleneck else hidden / (bottleneck + 0.5)


def options_of(adapters: dict[str, dict[str, Tensor]], shared: dict[str, Tensor]) -> dict[str, Any]:
    """The options that weights tell: sizes, what is factorised, shared, and there at all.

    Raises:
        ValueError: adapters of more than one size.
    """
    first = {**next(iter(adapters.values())), **dict(borrowed(shared))}
    if "down.W_left" not in first and "down.W" not in first:
        raise ValueError(f"an adapter without W_left and W; it has {', '.join(sorted(first))}")
    found = {sizes({**own, **dict(borrowed(shared))}) for own in adapters.values()}
    if len(found) > 1:
        raise ValueError(f"adapters of more than one size (hidden, bottleneck): {sorted(found)}")
    left = first["down.W_left"] if "down.W_left" in first else first["down.W"]
    return {
        "reduction_factor": factor(*sizes(first)),
        "phm_dim": left.shape[0],
        "phm_rank": left.shape[2] if "down.W_left" in first else 1,
        "phm_bias": "down.b" in first,
        "factorized_phm_W": "down.W_left" in first,
        "factorized_phm_rule": "down.phm_rule_left" in first,
        "shared_phm_rule": any(name in RULES for name in shared),
        "shared_W_phm": any(name.startswith("W") for name in shared),
        "scaling": "learned" if "scaling" in first else 1.0,
        "ln_before": "norm_before.weight" in first,
        "ln_after": "norm_after.weight" in first,
    }


def about_model(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of the model, without what is no name or number."""
    kinds = {"base_model_name_or_path": str, "model_type": str, "hidden_size": int, "num_hidden_layers": int}
    return {key: found[key] if isinstance(found.get(key), kind) else None for key, kind in kinds.items()}
