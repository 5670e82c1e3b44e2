"""Which adapters compute each sample of a batch, where a model holds several side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.nn.stack import along, check_mixable, options_of, stack, stackable


class Choice:
    """The adapter of each sample, or the weights of several adapters.

    Args:
        names: of the adapters that occur.
        route: numbers of these names, -1 for none, as (B,) or (B, S).
        mix: weights of these names, as (K,) or (B, K).
        repeats: how often a sample may be repeated, one after the other, as generate() does for its
            beams; None for any number.
    """

    def __init__(
        self, names: Iterable[str], route: Tensor | None = None, mix: Tensor | None = None, repeats: int | None = None
    ) -> None:
        self.names, self.route, self.mix, self.repeats = tuple(names), route, mix, repeats

    @functools.cached_property
    def rows(self) -> list[Tensor] | None:
        """Those of x (B, ...) that have each name, for which the GPU is waited; None for tokens."""
        if self.route is None or self.route.ndim != 1:
            return None
        return [torch.nonzero(self.route == number).flatten() for number in range(len(self.names))]

    def of_batch(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """route and mix for x (B, ...), whose samples may be repeated; ValueError for a wrong B."""
        if self.mix is not None and self.mix.ndim == 1:
            return None, self.mix.to(x.device)
        given: Any = self.route if self.mix is None else self.mix
        times = self.times(x)
        given = (given if times == 1 else given.repeat_interleave(times, 0)).to(x.device)
        return (given, None) if self.mix is None else (None, given)

    def times(self, x: Tensor) -> int:
        """How often x repeats each sample; ValueError if it has another number of them."""
        given: Any = self.route if self.mix is None else self.mix
        count, rows = given.shape[0], x.shape[0]
        if rows == count:
            return 1
        times = rows // max(count, 1)
        if times * count != rows or self.repeats not in (None, times):
            raise ValueError(self.wrong_length(count, rows))
        return times  # type: ignore[no-any-return]

    def wrong_length(self, given: int, rows: int) -> str:
        """What to say where the batch has another number of samples."""
        return f"adapters are chosen for {given} samples, and a module got {rows}, which is no multiple of that"

    def of_layer(self, layer: int) -> Choice:
        """The choice of one of the positions of adapters, if it has weights for each of them."""
        if self.mix is None or self.mix.ndim < 3:
            return self
        return Choice(self.names, None, self.mix[:, layer], self.repeats)


class Part(NamedTuple):
    """Adapters that one call computes together.

    numbers: of their names in the choice. together: False for a single one that must be called as a
    module. table: at each number of the choice, the number of the same adapter here, or -1 if it is
    not here. The last entry is -1, which the number -1 reads. None: both numbers are the same.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    together: bool
    table: Tensor | None


class Chosen(NamedTuple):
    """What a position of a model, or a module with trained copies, computes under a choice."""

    choice: Choice
    parts: tuple[Part, ...]


class Chooser:
    """A module that holds adapters, or trained copies of a module, by name.

    holds_adapters: False for trained copies. chooses_for_peft: whether it gives the choice to the
    modules that peft trains whole.
    """

    holds_adapters, chooses_for_peft = True, False
    chosen_adapters: Chosen | None = None

    def held_adapters(self) -> Mapping[str, Any]:
        """What it holds, by name."""
        raise NotImplementedError

    def input_key(self, name: str) -> Any:
        """Equal for adapters that take the same input and add to the same tensor."""
        return None

    def choose_adapters(self, choice: Choice | None) -> None:
        """Compute with this choice, or as before; ValueError: the choice cannot be computed."""
        self.chosen_adapters = None if choice is None else Chosen(choice, self.parts_of(choice))

    def parts_of(self, choice: Choice) -> tuple[Part, ...]:
        """The adapters that occur here, in groups of equal options and inputs."""
        return grouped(choice, self.held_adapters(), self.input_key)


def check_no_choice(model: nn.Module) -> None:
    """Raise RuntimeError in a context of route or mix, which knows only what was there before."""
    if any(isinstance(module, Chooser) and module.chosen_adapters is not None for module in model.modules()):
        raise RuntimeError("the model is in a context of route or mix; leave it before you add or remove adapters")


def grouped(choice: Choice, held: Mapping[str, Any], input_key: Callable[[str], Any]) -> tuple[Part, ...]:
    """The names of the choice that are held, in groups of equal options and inputs."""
    groups: list[tuple[Any, list[str]]] = []
    for name in choice.names:
        if name in held:
            key = (options_of(held[name]), input_key(name)) if stackable(held[name]) else name
            group = next((names for other, names in groups if other == key), None)
            if group is None:
                groups.append((key, [name]))
            else:
                group.append(name)
    return tuple(_part(choice, names, key != names[0]) for key, names in groups)


def check_inputs(choice: Choice, reads: Mapping[str, object]) -> None:
    """Raise ValueError if adapters take the inputs of different modules, by the adapters' names.

    A model keeps one such input at a time.
    """
    given = [reads[name] for name in choice.names if name in reads]
    if any(module is not given[0] for module in given):
        raise ValueError(
            f"is_parallel or original_ln_before differs between {', '.join(choice.names)}, which so take the inputs of "
            "different modules; choose them in separate calls of the model"
        )


def _part(choice: Choice, names: Sequence[str], together: bool) -> Part:
    numbers = tuple(choice.names.index(name) for name in names)
    table = None
    if choice.route is not None and numbers != tuple(range(len(choice.names))):
        of_number = {number: own for own, number in enumerate(numbers)}
        table = torch.tensor([of_number.get(number, -1) for number in range(len(choice.names))] + [-1])
        table = table.to(choice.route.device)
    return Part(tuple(names), numbers, together, table)


def computes_on(model: nn.Module) -> torch.device:
    """The device of a model's first parameter with values, where a choice should lie."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def adapted(chosen: Chosen, held: Any, y: Tensor, inputs_of: Callable[[str, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """y with the adapter of each sample, or with the weighted sum of what adapters add to it.

    inputs_of: what an adapter takes, and what it adds to.
    """
    result = y
    for part in chosen.parts:
        x, base = inputs_of(part.names[0], y)
        route, mix = chosen.choice.of_batch(x)
        if route is not None and part.table is not None:
            route = part.table.to(route.device)[route]
        if mix is not None and len(part.numbers) < len(chosen.choice.names):
            mix = torch.stack([mix[..., number] for number in part.numbers], -1)  # an index would wait for the GPU
        adapters = [held[name] for name in part.names]
        if mix is not None:
            if base is not y:
                raise ValueError("residual_before_ln=False: adapters that add to what they take cannot be mixed")
            check_mixable(adapters[0])
            if part.together:
                result = stack(adapters)(x, result, None, mix).to(y.dtype)
            else:
                result = result + along(mix[..., 0], y, 0).to(y.dtype) * adapters[0](x, torch.zeros_like(y)).to(y.dtype)
        elif base is y and part.together:
            result = stack(adapters)(x, result, route, None).to(y.dtype)
        else:
            assert route is not None
            changed = stack(adapters)(x, base, route, None) if part.together else adapters[0](x, base)
            result = torch.where(along(route >= 0, y, 0), changed.to(y.dtype), result)
    return result


def copied(chosen: Chosen, x: Tensor, y: Tensor, call: Callable[[str, Tensor], Tensor]) -> Tensor:
    """y with the outputs of the trained copies of each sample, or with y + w (copy - y) of each.

    x, y: the input and the output of the original module. call: the copy of that name. A copy gets
    its own samples. For tokens, and where a compiler makes one graph for all routes, it gets all.
    """
    choice, result = chosen.choice, y
    route, mix = choice.of_batch(x)
    for part in chosen.parts:
        for name, number in zip(part.names, part.numbers, strict=True):
            if mix is not None:
                result = result + along(mix[..., number], y, 0) * (call(name, x).to(y.dtype) - y)
            elif torch.compiler.is_compiling() or choice.rows is None:  # one graph for any number of rows
                assert route is not None
                if x.shape[: route.ndim] != route.shape:
                    raise ValueError(
                        f"route has the shape {tuple(route.shape)}, and a module that is trained whole takes "
                        f"{tuple(x.shape)}; give one adapter for each sample"
                    )
                result = torch.where(along(route == number, y, 0), call(name, x).to(y.dtype), result)
            else:
                times, rows = choice.times(x), choice.rows[number].to(x.device)
                if times > 1:
                    rows = (rows[:, None] * times + torch.arange(times, device=x.device)).flatten()
                result = result.index_copy(0, rows, call(name, x[rows]).to(y.dtype))
    return result
