"""A module of the base together with the adapters that follow it, as peft wraps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from compacter_kernels.inject.hidden_states import map_first
from compacter_kernels.inject.offload import onloaded
from compacter_kernels.nn.choice import Choice, Chooser, Part, adapted, check_inputs
from compacter_kernels.nn.flat_names import flat
from compacter_kernels.peft.block_input import BlockInput, forget, numbers
from compacter_kernels.peft.shared import SharedParameters
from compacter_kernels.targets.fast_path import FastPath

CANNOT_MERGE = (
    "a bottleneck adapter has a nonlinear function inside and cannot be merged into the weights of the base; keep it "
    "beside them (a call costs little), or call unload() to go back to the base without it"
)


class AdapterLayer(Chooser, nn.Module, BaseTunerLayer):
    """y = base_layer(x), and then y + sum over active adapters of (adapter(y) - y).

    Some adapters take another input than y, which `reads` gives. base_layer may also return a
    tuple, list or dict that begins with its output.

    All parameters lie flat in ParameterDicts, one for each kind, keyed by the name of the adapter:
    peft before 0.21 loads no parameters of nested modules. The modules that compute, in `adapters`,
    borrow them and own none. All names begin with the prefix, by which peft knows its own modules.

    Args:
        base_layer: a module of the base, or another layer of peft around it.
        prefix: what the names of the ParameterDicts begin with.
        fast_path: of the torch encoders in the model, which is off while an adapter is in use.
    """

    def __init__(self, base_layer: nn.Module, prefix: str, fast_path: FastPath) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names = (f"{prefix}adapters", "reads", "fixed")
        setattr(self, f"{prefix}adapters", nn.ModuleDict())
        self.reads: dict[str, BlockInput] = {}
        self.fixed: dict[str, list[str]] = {}
        self.number = next(numbers)  # A copy of this layer has the same one.
        self.prefix, self._shared = prefix, list[SharedParameters]()
        self.fast_path = fast_path
        fast_path.allow(False, self)

    def __getattr__(self, name: str) -> Any:
        """An attribute of base_layer, such as out_features, or batch_first of an attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Libraries mark modules by private attributes; this one says how an attention computes.
            if name == "base_layer" or (name.startswith("_") and name != "_qkv_same_embed_dim"):
                raise
            return getattr(self.base_layer, name)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The modules that compute, by the names of the adapters."""
        return self._modules[f"{self.prefix}adapters"]  # type: ignore[return-value]

    def add_adapter(
        self,
        name: str,
        adapter: nn.Module,
        *,
        shared: Mapping[str, SharedParameters],
        fixed: Sequence[str],
        read: BlockInput | None,
    ) -> None:
        """Add an adapter, whose own parameters move into the dicts of this layer.

        shared: the dicts of the model that the adapter borrows from. fixed: the names of the dicts
        whose parameters are never trained. read: what gives the input; None for an adapter that
        takes the output of base_layer.
        """
        for key, parameter in list(adapter.named_parameters()):
            kind = flat(key, self.prefix)
            if kind not in self.adapter_layer_names:
                setattr(self, kind, nn.ParameterDict())
                self.adapter_layer_names += (kind,)
            values = getattr(self, kind)
            values[name] = parameter
            path, _, leaf = key.rpartition(".")
            adapter.get_submodule(path).borrow(values, **{leaf: name})  # type: ignore[operator]
        for kind, shared_values in shared.items():
            if kind not in self.adapter_layer_names:
                self.__dict__[kind] = shared_values  # No child: the model owns it.
                self.adapter_layer_names += (kind,)
                self._shared.append(shared_values)
        self.adapters[name] = adapter
        self.fixed[name] = list(fixed)
        if read is not None:
            self.reads[name] = read

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use and train these adapters, and no others. What is fixed stays fixed."""
        super().set_adapter(adapter_names, inference_mode)
        self._fix()
        for shared in self._shared:
            shared.set_adapter(self.active_adapters)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters or not. What is fixed stays fixed."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._fix()

    def _fix(self) -> None:
        for name, kinds in self.fixed.items():
            for kind in kinds:
                getattr(self, kind)[name].requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active adapters, or none: then the layer computes as base_layer, bit by bit."""
        super().enable_adapters(enabled)
        self.fast_path.allow(not enabled, self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter of that name, with its parameters."""
        if adapter_name in self.reads:
            self.reads[adapter_name].remove()
        super().delete_adapter(adapter_name)

    def held_adapters(self) -> Mapping[str, Any]:
        """The adapters by name."""
        return self.adapters._modules

    def input_key(self, name: str) -> Any:
        """Equal for adapters that take the same input and add to the same tensor."""
        return self.reads[name].key if name in self.reads else None

    def parts_of(self, choice: Choice) -> tuple[Part, ...]:
        """The adapters that occur here; ValueError if they take the inputs of different modules."""
        check_inputs(choice, {name: read.module for name, read in self.reads.items()})
        return super().parts_of(choice)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call base_layer and apply the active adapters, or those chosen for each sample."""
        output = self.base_layer(*args, **kwargs)

        def inputs_of(name: str, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.reads[name](y, args, kwargs) if name in self.reads else (y, y)

        def apply_active(y: Tensor) -> Tensor:
            result = y
            for name in self.active_adapters:
                if name in self.adapters:
                    changed = self.adapters[name](*inputs_of(name, y))
                    result = changed if result is y else result + (changed - y)
            return result

        def apply_chosen(y: Tensor) -> Tensor:
            return adapted(self.chosen_adapters, self.adapters, y, inputs_of)  # type: ignore[arg-type]

        if not self.disable_adapters:
            with onloaded(getattr(self, kind) for kind in self.adapter_layer_names):
                output = map_first(
                    apply_active if self.chosen_adapters is None else apply_chosen, output, self.base_layer
                )
        if self.reads:
            forget()
        return output

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
        for read in self.reads.values():
            read.remove()
        self.fast_path.allow(True, self)
        return self.base_layer
