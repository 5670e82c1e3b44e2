"""AdapterBank, many adapters whose parameters lie side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.nn.adapter import CompacterAdapter
from compacter_kernels.nn.adapter_base import AdapterBase, SharesRule
from compacter_kernels.nn.bottleneck import BottleneckAdapter
from compacter_kernels.nn.dense import random_state_kept
from compacter_kernels.nn.stack import Stack, options_of, packed
from compacter_kernels.private import children, parameter

KINDS: dict[str, type[AdapterBase]] = {"compacter": CompacterAdapter, "bottleneck": BottleneckAdapter}
_FREE = ("dtype", "impl", "learn_phm", "dropout")  # options that may differ from those of a source
Source = AdapterBase | Mapping[str, Tensor]
Route = Tensor | Sequence[str | None]


class AdapterBank(SharesRule):
    """Adapters of one shape by name, of which each row of x takes one, or a weighted sum of all.

        route:  scale * up_e(act(down_e(x))) + x, with e the adapter of the row
        mix:    sum_e w_e scale * up_e(act(down_e(x))) + x, with the w_e of the row

    The parameters are those of a single adapter, `down.W_left` or `down.weight` and so on, with a
    leading dimension E. So an optimizer sees one parameter for all adapters: an adapter that no
    row takes gets a gradient of 0, with which momentum and weight decay still move it.

    Args:
        hidden_size: the width of x.
        names: of the adapters, in their order.
        kind: "compacter" or "bottleneck".
        share_rule: whether all adapters have one phm_rule, without a leading dimension.
        options: those of `CompacterAdapter` or `BottleneckAdapter`. With layer norms, adapters can
            be routed but not mixed. Dropout acts on the weighted sum.

    Raises:
        TypeError, ValueError: an option does not fit; the message names it.
    """

    scaling: nn.Parameter | None
    _like: AdapterBase

    def __init__(
        self,
        hidden_size: int,
        names: Iterable[str],
        *,
        kind: str = "compacter",
        share_rule: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not known; choose one of {', '.join(KINDS)}")
        if "phm_rule" in options:
            raise TypeError("phm_rule: the rule of a bank is its own; share_rule=True gives all adapters the same")
        if share_rule and kind != "compacter":
            raise ValueError(f"share_rule=True: adapters of the kind {kind!r} have no rule")
        self.kind, self.share_rule = kind, share_rule
        self.names: tuple[str, ...] = ()
        names = tuple(names)
        if not names:
            raise ValueError("names is empty; a bank has at least one adapter")
        first: Any = KINDS[kind](hidden_size, device=device, dtype=dtype, **options)
        # An adapter without memory, for the options. In the dict of the instance it is no child.
        like = copy.deepcopy(first).to("meta")
        self.__dict__["_like"] = like
        self.down, self.up = nn.Module(), nn.Module()
        self.norm_before = None if like.norm_before is None else nn.Module()
        self.norm_after = None if like.norm_after is None else nn.Module()
        shared: dict[int, nn.Parameter] = {}
        for path, single in first.named_parameters(remove_duplicate=False):
            stacked = single.detach() if self._shares(path) else single.detach()[None]
            value = shared.setdefault(id(single), nn.Parameter(stacked.clone(), single.requires_grad))
            self._set(path, value)
        for side in (self.down, self.up):
            for name in ("b", "bias"):
                if name in first.down._parameters and name not in side._parameters:
                    side.register_parameter(name, None)
        if like.scale != "learned":
            self.register_parameter("scaling", None)
        self.names = (self._new_name(names[0]),)
        for name in names[1:]:
            self.add(name)

    # -- the adapters by name

    def add(self, name: str, source: Source | None = None) -> None:
        """Add an adapter behind the others, which keep their bits and their numbers.

        source: an adapter or its state dict, which is copied; None draws new values. The bank's
        parameters become new ones, so give them to the optimizer again. Raises as `replace`.
        """
        self._new_name(name)
        state = self._checked(self._built() if source is None else source, fresh=source is None)
        self._exchange(lambda path, old: torch.cat([old, state[path].to(old)[None]]))
        self.names = (*self.names, name)

    @torch.no_grad()
    def replace(self, name: str, source: Source) -> None:
        """Give an adapter the values of another one or of a state dict, in place.

        Raises:
            KeyError: there is no adapter of that name.
            TypeError, ValueError: source has other options or shapes, or with share_rule another
                rule; the message names it.
        """
        index, state = self.index(name), self._checked(source)
        for path, own in self._each():
            if not self._shares(path):
                own[index].copy_(state[path])

    def drop(self, name: str) -> None:
        """Take an adapter out. The others keep their bits; the numbers behind it become one less.

        The bank's parameters become new ones. KeyError: there is no adapter of that name.
        ValueError: it is the last one.
        """
        self._check_whole()
        index = self.index(name)
        if len(self.names) == 1:
            raise ValueError(f"{name!r} is the last adapter of the bank, which has at least one")
        self._exchange(lambda path, old: torch.cat([old[:index], old[index + 1 :]]))
        self.names = self.names[:index] + self.names[index + 1 :]

    def index(self, name: str) -> int:
        """The number of an adapter in a route; KeyError if there is none of that name."""
        if name not in self.names:
            raise KeyError(f"the bank has no adapter {name!r}; it has {', '.join(self.names)}")
        return self.names.index(name)

    def __getitem__(self, name: str) -> Any:
        """A copy of an adapter, as a `CompacterAdapter` or `BottleneckAdapter` of its own."""
        self._check_whole()
        with random_state_kept(self._device):
            made = self._built().train(self.training)
        index = self.index(name)
        state = {path: own if self._shares(path) else own[index] for path, own in self._each()}
        made.load_state_dict({path: value.detach() for path, value in state.items()})
        for path, own in self._each():
            made.get_parameter(path).requires_grad_(own.requires_grad)
        return made

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def options(self) -> dict[str, Any]:
        """The options on which the function of its adapters depends, by name."""
        options = options_of(self._like)
        return {name: value for name, value in options.items() if name not in ("kind", *_FREE)}

    # -- the computation

    def forward(
        self, x: Tensor, route: Route | None = None, mix: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Map x (..., hidden_size) to the same shape, in the promoted dtype of x and residual.

        Args:
            route: the number of each row's adapter, as (B,) or (B, S) for x (B, S, k), or a name
                for each of the B. -1 or None: no adapter, and the row is its residual, or 0.
            mix: the weights of all adapters, as (E,), (B, E) or (B, S, E); differentiable.
            residual: a tensor to add instead of x.

        Raises:
            TypeError, ValueError, KeyError, IndexError: an argument does not fit, or names no
                adapter, or not exactly one of route and mix is given.
        """
        if residual is None and self._like.add_residual:
            residual = x
        if route is not None and not isinstance(route, Tensor):
            if len(route) != len(x):
                raise ValueError(f"route has {len(route)} names for {len(x)} samples")
            numbers = [-1 if name is None else self.index(name) for name in route]
            route = torch.tensor(numbers, dtype=torch.int64)
            route = (route.pin_memory() if x.is_cuda else route).to(x.device, non_blocking=True)  # without waiting
        return self._stack()(x, residual, route, mix)

    def _stack(self) -> Stack:
        """The parameters for the functions."""

        def read(names: tuple[str, ...]) -> Any:
            *path, name = names
            return parameter(children(self)[path[0]] if path else self, name)

        return packed(self._like, read, self.training)

    # -- the parameters

    @property
    def _device(self) -> torch.device:
        return next(self.down.parameters()).device

    def _built(self) -> AdapterBase:
        """A single adapter with new values, on the device and in the dtype of the bank."""
        made: Any = copy.deepcopy(self._like).to(next(self.down.parameters()).dtype).to_empty(device=self._device)
        made.reset_parameters()
        return made  # type: ignore[no-any-return]

    def _shares(self, path: str) -> bool:
        """Whether all adapters have this parameter in common."""
        return self.share_rule and "phm_rule" in path

    def _each(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.named_parameters(remove_duplicate=False))

    def _set(self, path: str, value: nn.Parameter) -> None:
        owner, _, name = path.rpartition(".")
        self.get_submodule(owner).register_parameter(name, value)

    def _exchange(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Exchange all stacked parameters for changed ones; a parameter of two names stays one.

        All are made first, so that an error, such as of memory, leaves the bank as it was.
        """
        stacked, made = [(path, old) for path, old in self._each() if not self._shares(path)], dict[int, nn.Parameter]()
        for path, old in stacked:
            if id(old) not in made:
                made[id(old)] = nn.Parameter(change(path, old.detach()), old.requires_grad)
        for path, old in stacked:
            self._set(path, made[id(old)])

    def _new_name(self, name: str) -> str:
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of an adapter must be a string, got {name!r}")
        if name in self.names:
            raise ValueError(f"the bank has an adapter {name!r} already; replace it, or give another name")
        return name

    def _check_whole(self) -> None:
        """Raise ValueError if the bank's parameters are cut into pieces."""
        if any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in self.parameters()):
            raise ValueError("the parameters of the bank are sharded; exchange its adapters before that")

    def _checked(self, source: Source, fresh: bool = False) -> dict[str, Tensor]:
        """The tensors of a source by the names of the bank's parameters."""
        self._check_whole()
        if isinstance(source, AdapterBase):
            given = options_of(source)
            for option, value in {"kind": KINDS[self.kind], **self.options()}.items():
                if given.get(option) != value:
                    raise ValueError(f"{option} is {value!r} in the bank, and {given.get(option)!r} in the source")
            source = source.state_dict()
        elif not isinstance(source, Mapping):
            raise TypeError(f"source must be an adapter or its state dict, got {type(source).__name__}")
        own = dict(self._each())
        if source.keys() != own.keys():
            wrong = sorted(source.keys() ^ own.keys())
            raise ValueError(
                f"source must have the parameters {', '.join(own)}; these do not agree: {', '.join(wrong)}"
            )
        for path, value in source.items():
            shape = own[path].shape if self._shares(path) else own[path].shape[1:]
            if value.shape != shape or not value.is_floating_point():
                raise ValueError(
                    f"{path} must be floats of shape {tuple(shape)}, got {value.dtype}, {tuple(value.shape)}"
                )
            if self._shares(path) and not fresh and not torch.equal(value.to(own[path]), own[path]):
                raise ValueError(f"share_rule=True: the source has another {path} than the bank")
        first: dict[int, str] = {}
        for path, tensor in own.items():
            other = first.setdefault(id(tensor), path)
            if other != path and not fresh and not torch.equal(source[path], source[other]):
                raise ValueError(f"{other} and {path} are one parameter in the bank, and differ in the source")
        return dict(source)

    def extra_repr(self) -> str:
        """The arguments that rebuild this bank."""
        hidden_size, _, options = self._like.extra_repr().replace(", device='meta'", "").partition(", ")
        kind = "" if self.kind == "compacter" else f", kind={self.kind!r}"
        shared = ", share_rule=True" if self.share_rule else ""
        return f"{hidden_size}, names={list(self.names)}{kind}{shared}{options and ', ' + options}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
