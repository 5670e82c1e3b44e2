"""A module of the base together with the adapters that follow it, as peft wraps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from compacter_kernels.inject.hidden_states import map_first
from compacter_kernels.nn.borrower import Borrower
from compacter_kernels.nn.flat_names import flat
from compacter_kernels.peft.sources import BlockInput, numbers

BASE = "__base__"  # The name that peft gives in adapter_names to a sample that has no adapter.
CANNOT_MERGE = (
    "a bottleneck adapter has a nonlinear function inside and cannot be merged into the weights of the base; keep it "
    "beside them (a call costs little), or call unload() to go back to the base without it"
)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """y = base_layer(x), and then y + sum over active adapters of (adapter(y) - y).

    Some adapters take another input than y, which `sources` gives. y may also be the first element
    of what base_layer returns.

    All parameters lie flat in ParameterDicts, one for each kind, keyed by the name of the adapter:
    peft before 0.21 loads no parameters of nested modules. The modules that compute, in `adapters`,
    borrow them and own none. All names begin with the prefix, by which peft knows its own modules.

    Args:
        base_layer: a module of the base, or another layer of peft around it.
        prefix: what the names of the ParameterDicts begin with.
    """

    def __init__(self, base_layer: nn.Module, prefix: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names = (f"{prefix}adapters", "sources")
        setattr(self, f"{prefix}adapters", nn.ModuleDict())
        self.sources: dict[str, BlockInput] = {}
        self.number = next(numbers)  # A copy of this layer has the same one.
        self._prefix = prefix

    @property
    def adapters(self) -> nn.ModuleDict:
        """The modules that compute, by the names of the adapters."""
        return self._modules[f"{self._prefix}adapters"]  # type: ignore[return-value]

    def add_adapter(
        self, name: str, adapter: nn.Module, shared: Mapping[str, nn.ParameterDict], source: BlockInput | None
    ) -> None:
        """Add an adapter, whose own parameters move into the dicts of this layer.

        shared: the dicts of the model that the adapter borrows from. source: of its input; None for
        an adapter that takes the output of base_layer.
        """
        for key, parameter in list(adapter.named_parameters()):
            kind = flat(key, self._prefix)
            if kind not in self.adapter_layer_names:
                setattr(self, kind, nn.ParameterDict())
                self.adapter_layer_names += (kind,)
            values = getattr(self, kind)
            values[name] = parameter
            path, _, leaf = key.rpartition(".")
            adapter.get_submodule(path).borrow(values, **{leaf: name})  # type: ignore[operator]
        for kind, values in shared.items():
            if kind not in self.adapter_layer_names:
                self.__dict__[kind] = values  # No child: the model owns it.
                self.adapter_layer_names += (kind,)
        self.adapters[name] = adapter
        if source is not None:
            self.sources[name] = source

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use and train these adapters, and no others. A fixed phm_rule stays fixed."""
        super().set_adapter(adapter_names, inference_mode)
        self._fix_rules()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters or not. A fixed phm_rule stays fixed."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._fix_rules()

    def _fix_rules(self) -> None:
        for adapter in self.adapters.values():
            for projection in adapter.children():
                if getattr(projection, "learn_phm", True) is False:
                    for rule in projection.rule_names():  # type: ignore[operator]
                        Borrower._weight(projection, rule).requires_grad_(False)  # type: ignore[arg-type]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter of that name, with its parameters."""
        if adapter_name in self.sources:
            self.sources[adapter_name].remove()
        super().delete_adapter(adapter_name)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call base_layer and apply the active adapters, or those that adapter_names says.

        adapter_names: the name of the adapter of each sample, or "__base__".
        """
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        if adapter_names is not None:
            return map_first(lambda y: self._mixed(y, adapter_names, args, kwargs), output, self.base_layer)
        names = [name for name in self.active_adapters if name in self.adapters]
        return map_first(lambda y: self._applied(names, y, args, kwargs), output, self.base_layer) if names else output

    def _inputs(self, name: str, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the adapter of that name takes and what it adds to."""
        return self.sources[name](y, args, kwargs) if name in self.sources else (y, y)

    def _applied(self, names: Sequence[str], y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        outputs = [self.adapters[name](*self._inputs(name, y, args, kwargs)) for name in names]
        result: Tensor = outputs[0]
        for other in outputs[1:]:
            result = result + (other - y)
        return result

    def _mixed(self, y: Tensor, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if len(names) != len(y):
            raise ValueError(f"adapter_names has {len(names)} names for a batch of {len(y)} samples")
        result = y
        for name in dict.fromkeys(names):
            if name in self.adapters:
                x, residual = self._inputs(name, y, args, kwargs)
                rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=y.device)
                result = result.index_copy(0, rows, self.adapters[name](x[rows], residual[rows]).to(y.dtype))
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError(CANNOT_MERGE)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """The base layer, as peft's unload() asks for it; NotImplementedError if merge."""
        if merge:
            raise NotImplementedError(CANNOT_MERGE)
        for source in self.sources.values():
            source.remove()
        return self.base_layer
