"""A checkpoint between two formats: adapters by their targets, and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.checkpoints.methods import COMPACTER, METHODS
from compacter_kernels.config import DTYPES
from compacter_kernels.nn.adapter import reduction_factor_of

POSITIONS = ("down", "up")
RULES = ("phm_rule", "phm_rule_left", "phm_rule_right")
FACTORS = ("W_left", "W_right", "W")
# The names of shared weights -> their names in an adapter.
SHARED: dict[str, tuple[str, ...]] = {name: (f"down.{name}", f"up.{name}") for name in RULES}
SHARED |= {name.replace("W", f"W_{position}"): (f"{position}.{name}",) for position in POSITIONS for name in FACTORS}
Written = tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Tensor]]  # tensors, config, head of `Converted`


class MissingRuleError(ValueError):
    """A checkpoint lacks weights which its adapters share."""


@dataclass
class Checkpoint:
    """The adapters of a model, as every format holds them in its adapter way.

    method: a key of `METHODS`. adapters: the name of a target -> the tensors of its adapter by
    their names here (`down.W_left`, `up.b`, ...), without those that it shares. shared: these, by
    the names in `SHARED`. copies: trained layer norms and heads, by the names of the parameters in
    the model's base. notes, losses: as in `Converted`.
    """

    method: str = COMPACTER
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    @property
    def config(self) -> Any:
        """The options; a ValueError says which one is unknown or does not fit."""
        try:
            return METHODS[self.method].config.from_dict(self.options)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """Return for each target all tensors of its adapter, including the shared ones."""
        return {target: {**adapter, **borrowed(self.shared)} for target, adapter in self.adapters.items()}

    def missing_shared(self) -> list[str]:
        """Return the names of shared weights that the options ask for and that are missing."""
        if self.method != COMPACTER:
            return []
        rules = RULES[1:] if self.options.get("factorized_phm_rule") else RULES[:1]
        factors = FACTORS[:2] if self.options.get("factorized_phm_W", True) else FACTORS[2:]
        needed = (rules if self.options["shared_phm_rule"] else ()) + (factors if self.options["shared_W_phm"] else ())
        missing = [name for name in SHARED if name not in self.shared]
        return [name for name in missing if SHARED[name][0].partition(".")[2] in needed]

    def share_equal_weights(self) -> None:
        """Take the weights that are equal in all adapters out of these, as shared ones."""
        first, *others = every = list(self.adapters.values())
        for weights in ("phm_rule", "W") if others else ("phm_rule",):
            names = [name for name, keys in SHARED.items() if name.startswith(weights) and keys[0] in first]
            of_first = {name: first[SHARED[name][0]] for name in names}
            needed = borrowed(of_first).items()
            if all(key in adapter and torch.equal(adapter[key], tensor) for adapter in every for key, tensor in needed):
                self.shared |= of_first
        for adapter in every:
            for name in borrowed(self.shared):
                del adapter[name]

    def options_of_weights(self) -> dict[str, Any]:
        """Return the options that the weights show, or raise ValueError for more than one size."""
        first = next(iter(self.whole().values()))
        all_sizes = {sizes(adapter) for adapter in self.whole().values()}
        if len(all_sizes) > 1:
            raise ValueError(f"adapters of more than one size (hidden, bottleneck): {sorted(all_sizes)}")
        factorised = "down.W_left" in first
        left = first["down.W_left" if factorised else "down.W"]
        return {
            "reduction_factor": reduction_factor_of(*sizes(first)),
            "phm_dim": left.shape[0],
            "phm_rank": left.shape[2] if factorised else 1,
            "phm_bias": "down.b" in first,
            "factorized_phm_W": factorised,
            "factorized_phm_rule": "down.phm_rule_left" in first,
            "shared_phm_rule": any(name.startswith("phm_rule") for name in self.shared),
            "shared_W_phm": any(name.startswith("W") for name in self.shared),
            "scaling": "learned" if "scaling" in first else 1.0,
            "ln_before": "norm_before.weight" in first,
            "ln_after": "norm_after.weight" in first,
        }

    def check(self) -> None:
        """Raise ValueError if the tensors of an adapter are not those that the options ask for."""
        config = self.config
        self.check_dtypes()
        if not self.adapters:
            raise ValueError("there are no adapters in it")
        for target, tensors in self.whole().items():
            try:
                expected = self._expected(tensors, config)
            except ValueError as error:
                raise ValueError(f"the adapter of {target}: {error}") from error
            for name in sorted(expected.keys() | tensors.keys()):
                if name not in tensors or name not in expected:
                    problem = "one more than the options ask for" if name in tensors else "missing"
                    raise ValueError(f"{name} of {target} is {problem}")
                shape, by_options = tuple(tensors[name].shape), tuple(expected[name].shape)
                if shape != by_options:
                    raise ValueError(f"{name} of {target} has shape {shape}, and must have {by_options} by the options")

    def check_dtypes(self) -> None:
        """Raise ValueError if a tensor of an adapter has a dtype that no adapter can have."""
        for target, tensors in self.whole().items():
            for name, tensor in tensors.items():
                if tensor.dtype not in DTYPES.values():
                    raise ValueError(f"{name} of {target} is {tensor.dtype}, not {' or '.join(DTYPES)}")

    def _expected(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Return the parameters, on meta, that the options give an adapter of these sizes."""
        hidden, bottleneck = sizes(tensors)
        given = config.reduction_factor
        if isinstance(given, int | float) and hidden // given != bottleneck:
            raise ValueError(f"reduction_factor={given} does not make {bottleneck} of {hidden}")
        options = {"reduction_factor": reduction_factor_of(hidden, bottleneck), **config.of_each_adapter()}
        try:
            adapter = METHODS[self.method].adapter(hidden, device="meta", **options)
        except (TypeError, RuntimeError, OverflowError) as error:  # no tensor can have these sizes
            raise ValueError(f"the options ask for what cannot be built: {str(error).splitlines()[0]}") from error
        return dict(adapter.named_parameters())


def borrowed(shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return shared tensors by their names in an adapter: `down.phm_rule`, `up.phm_rule`, ..."""
    return {in_adapter: tensor for name, tensor in shared.items() for in_adapter in SHARED.get(name, (name,))}


def sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the hidden size and the bottleneck of an adapter, or raise ValueError."""
    dense = tensors.get("down.weight")
    if dense is not None:
        if dense.dim() != 2 or not dense.numel():
            raise ValueError(f"the weight of a projection has two dimensions, got {tuple(dense.shape)}")
        return dense.shape[1], dense.shape[0]
    left = tensors.get("down.W_left", tensors.get("down.W"))
    if left is None:
        raise ValueError(f"an adapter without W_left and W; it has {', '.join(sorted(tensors))}")
    right = tensors.get("down.W_right", left)
    if left.dim() != 3 or right.dim() != 3:
        raise ValueError(f"W of a PHM layer has three dimensions, got {tuple(left.shape)} and {tuple(right.shape)}")
    return left.shape[0] * left.shape[1], right.shape[0] * right.shape[2]
