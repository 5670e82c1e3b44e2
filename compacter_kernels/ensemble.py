"""Ensembles of adapters whose weights are fitted to each sentence when the model predicts it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compacter_kernels.choose import mix, places_to_mix
from compacter_kernels.nn.choice import computes_on
from compacter_kernels.nn.stack import first_parameter

_START = 0.5  # of every number of alpha, as the authors start; softmax makes it 1/K


def minimise_entropy(
    model: nn.Module,
    forward: Callable[[], Tensor],
    adapters: Sequence[str],
    steps: int = 10,
    lr: float = 10.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix adapters by the weights that make the model surest of its predictions (EMEA).

    Each sentence has a vector alpha of K numbers for each place of adapters. They start equal.

        w = softmax(alpha);   E = mean over the kept tokens of -sum_c p_c log p_c
        alpha <- alpha - lr dE/dalpha, `steps` times

    The method is that of arXiv 2109.04877. The sentences of a batch do not affect one another: each
    gets the weights that it gets alone.

        logits, weights = ck.minimise_entropy(
            model, lambda: model(**batch).logits, ["en", "bg"], keep=batch["attention_mask"].bool()
        )

    Args:
        model: a model with adapters by `inject`, or by peft with compacter_kernels.peft, whose
            adapters `mix` can compute. It computes in the mode that it is in, so call model.eval()
            first. Trained layer norms and heads are refused, as by `mix` with weights for layers.
        forward: runs the model on the batch. It returns logits (B, S, classes), or (B, classes), in
            any float dtype. It is called steps + 1 times, and once more without keep.
        adapters: K names.
        steps: how many steps are taken, 0 or more.
        lr: the length of a step.
        keep: bool (B, S), or (B,) for logits (B, classes): the tokens whose entropy counts, which
            is all without keep. A sentence without such a token keeps equal weights.

    Returns:
        The logits of forward with the last weights, without a graph, and these weights, which are
        (B, layers, K) as `mix` takes them, in float32, or float64 for such adapters.

    The parameters get no gradient. They do not require one during the call, and do as before after
    it, also after an exception. It works within torch.no_grad() and torch.inference_mode().

    Raises:
        TypeError, ValueError: an argument or what forward returns does not fit, or the model's
            adapters cannot be mixed.
        RuntimeError: the model is in a context of route or mix already.
    """
    places = places_to_mix(model, adapters, "minimise_entropy")
    _check(forward, steps, lr, keep)
    names = tuple(adapters)
    held = next(place.held_adapters()[name] for place in places for name in names if name in place.held_adapters())
    dtype = torch.promote_types(first_parameter(held).dtype, torch.float32)
    device = computes_on(model)

    def predicted(alpha: Tensor) -> Tensor:
        with mix(model, names, alpha.softmax(-1)):
            return _checked_logits(forward(), keep)

    with torch.inference_mode(False), _frozen(model):
        alpha = torch.full((1, len(places), len(names)), _START, dtype=dtype, device=device)
        if keep is None:  # The model alone knows how many sentences there are.
            with torch.no_grad():
                keep = torch.ones(predicted(alpha).shape[:-1], dtype=torch.bool, device=device)
        keep = keep.clone()  # One that was made in inference mode could not be saved for a backward.
        alpha = alpha.repeat(len(keep), 1, 1)
        for _ in range(steps):
            with torch.enable_grad():
                alpha.requires_grad_()
                entropy = _entropies(predicted(alpha), keep)  # (B,)
                if not entropy.requires_grad:
                    raise ValueError("the logits of forward have no graph; it must not detach them or use no_grad")
                (of_alpha,) = torch.autograd.grad(entropy.sum(), alpha)  # of a sentence's own entropy alone
            alpha = alpha.detach() - lr * of_alpha
        with torch.no_grad():
            return predicted(alpha), alpha.softmax(-1)


def _check(forward: object, steps: object, lr: object, keep: object) -> None:
    if not callable(forward):
        raise TypeError(f"forward must be a function that runs the model, got {type(forward).__name__}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be a finite number > 0, got {lr!r}")
    if keep is None:
        return
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        kind = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep must be a tensor of bools, got {kind}")
    if keep.ndim not in (1, 2) or not len(keep):
        raise ValueError(f"keep must have the shape (B, S), or (B,), with B >= 1, got {tuple(keep.shape)}")


def _checked_logits(logits: Tensor, keep: Tensor | None) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"forward must return logits, a tensor of floats, got {kind}")
    if logits.ndim not in (2, 3) or not len(logits):
        shapes = "(B, S, classes) or (B, classes), with B >= 1"
        raise ValueError(f"forward must return logits of the shape {shapes}, got {tuple(logits.shape)}")
    if keep is not None and logits.shape[:-1] != keep.shape:
        raise ValueError(f"keep has the shape {tuple(keep.shape)}, and forward returned {tuple(logits.shape)}")
    return logits


def _entropies(logits: Tensor, keep: Tensor) -> Tensor:
    """(B,): the mean of -sum_c p_c log p_c over the kept tokens of each sentence, 0 without any."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = logits.log_softmax(-1)
    # of a class with the logit -inf, p log p is 0
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    keep = keep.to(entropy.device)
    total, count = torch.where(keep, entropy, 0.0), keep
    if keep.ndim == 2:
        total, count = total.sum(1), keep.sum(1)
    return total / count.clamp(min=1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter of the model requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_()
