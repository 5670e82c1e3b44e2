"""Contexts in which each sample of a batch has its own adapter, or a weighted sum of several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.nn.choice import Choice, Chooser, computes_on
from compacter_kernels.targets.wrappers import is_a

_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps the function that recomputes


@contextmanager
def route(
    model: nn.Module, adapters: Sequence[str | None] | Tensor, *, names: Sequence[str] | None = None
) -> Iterator[None]:
    """A context in which each sample of a batch has its own adapter, also in training.

        with ck.route(model, ["de", None, "sv", "de"]):
            loss = model(**batch).loss

    All adapters of equal options are computed by one call of a bank. Those that do not occur get no
    gradient. Trained layer norms and heads are those of the sample's adapter too.

    Args:
        model: a model with adapters by `inject`, or by peft with compacter_kernels.peft.
        adapters: the name of each sample's adapter, None for the base; or with names a tensor of
            numbers in names, -1 for the base, as (B,), or (B, S) for each token. The batch may
            repeat each sample as often as it likes, one after the other, as generate() does.
        names: of the numbers in a tensor. To read them, the call waits for the GPU.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has no such adapters.
        RuntimeError: the model is in such a context already.

    Call backward inside the context if the model recomputes its forward by your own calls of
    torch.utils.checkpoint; that of transformers may recompute outside.
    """
    holders = _holders(model, "route")
    if isinstance(adapters, Tensor):
        choice = _of_numbers(adapters.to(computes_on(model)), names)
    else:
        if names is not None:
            raise ValueError("names goes with a tensor of numbers; adapters already has the names")
        if isinstance(adapters, str):
            raise TypeError(f"adapters must be one name for each sample, got {adapters!r}")
        occur = sorted({name for name in adapters if name is not None})  # one graph of torch.compile for each set
        numbers = [-1 if name is None else occur.index(name) for name in adapters]
        choice = Choice(occur, torch.tensor(numbers, dtype=torch.int64).to(computes_on(model)))
    with _chosen(model, holders, choice, "route"):
        yield


@contextmanager
def mix(model: nn.Module, adapters: Sequence[str], weights: Tensor) -> Iterator[None]:
    """A context in which adapters are mixed: y + sum_k w_k (adapter_k(y) - y), differentiable in w.

        with ck.mix(model, ["de", "sv"], torch.softmax(logits, -1)):
            loss = model(**batch).loss

    Trained layer norms and heads are mixed in the same way.

    Args:
        model: a model with adapters by `inject`, or by peft with compacter_kernels.peft.
        adapters: K names.
        weights: (K,); (B, K), where the batch may repeat each sample; or (B, layers, K), where
            layers is the number of places with such adapters, in the order of model.modules(), and
            B may be 1. Trained layer norms and heads take no weights of this kind.

    Raises:
        TypeError, ValueError: an argument does not fit, or adapters with these options cannot be
            mixed; the message names the option.
        RuntimeError: the model is in such a context already.
    """
    holders = _holders(model, "mix")
    names = _mixed_names(adapters)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a tensor of floats, got {kind}")
    if weights.ndim not in (1, 2, 3) or weights.shape[-1] != len(names):
        shapes = f"({len(names)},), (B, {len(names)}) or (B, layers, {len(names)})"
        raise ValueError(f"weights must have the shape {shapes}, got {tuple(weights.shape)}")
    with _chosen(model, holders, Choice(names, None, weights.to(computes_on(model))), "mix"):
        yield


def places_to_mix(model: nn.Module, adapters: Sequence[str], function: str) -> list[Any]:
    """The places whose adapters `mix` weighs, in the order of their weights (B, layers, K).

    Raises what `mix` raises for the model and the names; its messages name the function.
    """
    return _places(_holders(model, function), _mixed_names(adapters), function)


def _mixed_names(adapters: Sequence[str]) -> tuple[str, ...]:
    if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
        raise TypeError(f"adapters must be names of adapters, got {adapters!r}")
    names = tuple(adapters)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"adapters must be different names, at least one, got {list(names)}")
    return names


def _places(holders: list[Any], names: Sequence[str], function: str) -> list[Any]:
    """The holders of adapters that have one of these names; ValueError for an unknown name."""
    known = dict.fromkeys(name for holder in holders for name in holder.held_adapters())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{function}: the model has no adapters {', '.join(unknown)}; it has {', '.join(known)}")
    return [h for h in holders if h.holds_adapters and any(name in h.held_adapters() for name in names)]


def _of_numbers(numbers: Tensor, names: Sequence[str] | None) -> Choice:
    """The choice of a tensor of numbers in names; only names that occur are in it."""
    if names is None:
        raise ValueError("adapters is a tensor of numbers, so names= must say whose they are")
    if numbers.dtype not in (torch.int64, torch.int32) or numbers.ndim not in (1, 2):
        found = f"{numbers.dtype} of the shape {tuple(numbers.shape)}"
        raise TypeError(f"adapters must be int64 or int32 of the shape (B,) or (B, S), got {found}")
    present = sorted(set(numbers.flatten().tolist()))
    if present and (present[0] < -1 or present[-1] >= len(names)):
        raise ValueError(f"adapters has numbers from {present[0]} to {present[-1]}, but names has {len(names)}")
    occur = [number for number in present if number >= 0]
    table = torch.full((len(names) + 1,), -1, device=numbers.device)
    table[occur] = torch.arange(len(occur), device=numbers.device)
    return Choice([names[number] for number in occur], table[numbers.long()])


def _holders(model: nn.Module, function: str) -> list[Any]:
    """The modules of the model that hold adapters or trained copies."""
    holders = [module for module in model.modules() if isinstance(module, Chooser)]
    if not any(holder.holds_adapters for holder in holders):
        raise ValueError(
            f"this {type(model).__name__} has no adapters; call compacter_kernels.inject first, or get_peft_model with "
            "a config of compacter_kernels.peft"
        )
    if any(holder.chosen_adapters is not None for holder in holders):
        raise RuntimeError(f"the model is in a context of route or mix already; leave it before {function}")
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise ValueError(f"{function} takes samples in the first dimension; make the model with batch_first=True")
    if any(is_a(m, "ModulesToSaveWrapper") for m in model.modules()) and not any(h.chooses_for_peft for h in holders):
        raise ValueError(f"peft trains modules of this model whole; give {function} what get_peft_model returned")
    return holders


@contextmanager
def _chosen(model: nn.Module, holders: list[Any], choice: Choice, function: str) -> Iterator[None]:
    places = _places(holders, choice.names, function)
    layered = choice.mix is not None and choice.mix.ndim == 3
    if layered and choice.mix.shape[1] != len(places):  # type: ignore[union-attr]
        raise ValueError(f"weights are for {choice.mix.shape[1]} layers; the adapters are at {len(places)} places")  # type: ignore[union-attr]
    if layered and any(
        not h.holds_adapters and any(name in h.held_adapters() for name in choice.names) for h in holders
    ):
        raise ValueError(
            "weights for each layer say nothing of layer norms and heads that are trained whole; give weights (B, K), "
            "or set train_layer_norms=False and modules_to_save=[]"
        )
    before = list[tuple[nn.Module, Any]]()
    try:
        for holder in holders:
            holder.choose_adapters(choice.of_layer(places.index(holder)) if holder in places else choice)
        chosen = [(holder, holder.chosen_adapters) for holder in holders]
        for module in model.modules():
            checkpoint = vars(module).get(_CHECKPOINT)
            if checkpoint is not None:
                before.append((module, checkpoint))
                setattr(module, _CHECKPOINT, functools.partial(_recomputed, checkpoint, chosen))
        yield
    finally:
        for holder in holders:
            holder.choose_adapters(None)
        for module, checkpoint in before:
            setattr(module, _CHECKPOINT, checkpoint)


def _recomputed(
    checkpoint: Callable[..., Any], chosen: list[tuple[Any, Any]], function: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    """The checkpoint of a function that computes under this choice, whenever it is recomputed."""
    return checkpoint(functools.partial(_under, chosen, function), *args, **kw)


def _under(chosen: list[tuple[Any, Any]], function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    before = [(holder, holder.chosen_adapters) for holder, _ in chosen]
    for holder, own in chosen:
        holder.chosen_adapters = own
    try:
        return function(*args, **kw)
    finally:
        for holder, own in before:
            holder.chosen_adapters = own
