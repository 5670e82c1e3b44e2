"""ck.minimise_entropy: a batch gives each sentence the weights of a plain torch loop of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import WORDS, build
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.inject.target_adapters import TargetAdapters

NAMES, CLASSES, LENGTHS = ("de", "sv", "nl"), 5, (7, 3, 5, 1)
ALONE: dict[str, Any] = {"reduction_factor": 4, "train_layer_norms": False, "modules_to_save": []}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}


def make(impl: str = "auto", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A small BERT whose predictions depend on its three adapters, in eval mode."""
    generator = torch.Generator().manual_seed(3)
    model = build("bert", **QUIET)
    for name in NAMES:
        ck.inject(model, ck.CompacterConfig(**{**ALONE, **options}), name=name, impl=impl)
    with torch.no_grad():
        for name in NAMES:
            for _, p in sorted(ck.adapter_parameters(model, name)):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        model.classifier.weight.copy_(torch.randn(model.classifier.weight.shape, generator=generator))
    return model.to(dtype).eval()


def sentences(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Padded sentences of these lengths."""
    tokens = torch.randint(3, WORDS, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def tagger(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Logits (B, S, classes)."""
    return lambda: model.classifier(model.bert(**batch).last_hidden_state)  # type: ignore[no-any-return]


def classifier(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Logits (B, classes)."""
    return lambda: model(**batch).logits  # type: ignore[no-any-return]


def adapter_of(y: Tensor, adapter: Any, w: Tensor) -> Tensor:
    """w times what the adapter adds to y, from its matrices."""
    matrices = [sum(torch.kron(a, s @ t) for a, s, t in zip(*side.weights()[:3], strict=True))
                for side in (adapter.down, adapter.up)]  # fmt: skip
    h = nn.functional.gelu(y @ matrices[0] + adapter.down.weights().bias, approximate="tanh")
    return w * (h @ matrices[1] + adapter.up.weights().bias)  # type: ignore[no-any-return]


def reference(
    model: nn.Module, run: Any, lengths: tuple[int, ...], keep: Tensor | None, steps: int, lr: float, names: Any = NAMES
) -> tuple[list[Tensor], Tensor]:
    """The logits and weights of each sentence, alone and without padding, in float64."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    places = [(name, m) for name, m in model.named_modules() if isinstance(m, TargetAdapters)]
    current: list[Tensor] = []
    for place, (name, held) in enumerate(places):

        def mixed(module: Any, args: Any, y: Tensor, held: Any = held, place: int = place) -> Tensor:
            return y + sum(adapter_of(y, held[name], current[0][place, k]) for k, name in enumerate(names))

        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(mixed)
    logits, weights = [], []
    for row, length in enumerate(lengths):
        batch = {key: value[row : row + 1, :length] for key, value in sentences(lengths).items()}
        alpha = torch.full((len(places), len(names)), 0.5).double()
        for step in range(steps + 1):
            alpha.requires_grad_()
            current[:] = [alpha.softmax(-1)]
            with ck.disable_adapters(model):
                out = run(model, batch)()[0]
            if step == steps:
                break
            p = out.softmax(-1)
            entropy = -(p * p.log()).sum(-1)
            entropy = entropy.mean() if keep is None else entropy[keep[row, :length]].mean()
            entropy.backward()
            alpha = alpha.detach() - lr * alpha.grad  # type: ignore[operator]
        logits.append(out.detach())
        weights.append(current[0].detach())
    return logits, torch.stack(weights)


def some_kept() -> Tensor:
    """A mask of tokens that leaves out some words of each sentence, and the padding."""
    keep = sentences()["attention_mask"].bool()
    keep[0, ::2] = keep[2, 1] = False
    return keep


def check(
    actual: tuple[Tensor, Tensor], expected: tuple[list[Tensor], Tensor], lengths: tuple[int, ...], limit: float
) -> None:
    logits, weights = actual
    assert not logits.requires_grad and not weights.requires_grad and weights.shape == expected[1].shape
    assert (weights.double() - expected[1]).abs().max() < limit
    for row, (own, length) in enumerate(zip(expected[0], lengths, strict=True)):
        of_sentence = logits[row, :length] if logits.ndim == 3 else logits[row]
        assert (of_sentence.double() - own).abs().max() < limit * own.abs().max()


IMPLS = [("factored", torch.float64), ("dense", torch.float64), ("factored", torch.float32), ("dense", torch.float32),
         ("cpu", torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
def test_sentences_of_a_batch_get_the_weights_they_have_alone(impl: str, dtype: torch.dtype) -> None:
    if ck.available_impls()[impl] is not None:
        pytest.skip(f"no {impl} here")
    model, keep = make(impl, dtype), some_kept()
    expected = reference(model, tagger, LENGTHS, keep, 10, 10.0)
    actual = ck.minimise_entropy(model, tagger(model, sentences()), NAMES, keep=keep)
    assert actual[1].dtype == dtype and (actual[1] - 1 / 3).abs().amax((1, 2)).min() > 0.4
    check(actual, expected, LENGTHS, 1e-12 if dtype == torch.float64 else 1e-5)


def test_a_bfloat16_model() -> None:
    model, keep = make(dtype=torch.bfloat16), some_kept()
    expected = reference(model, tagger, LENGTHS, keep, 2, 0.5)
    logits, weights = ck.minimise_entropy(model, tagger(model, sentences()), NAMES, 2, 0.5, keep)
    assert logits.dtype == torch.bfloat16 and weights.dtype == torch.float32
    assert (expected[1] - 1 / 3).abs().max() > 0.05
    check((logits, weights), expected, LENGTHS, 0.02)


@pytest.mark.parametrize("mask", [None, torch.ones(4, dtype=torch.bool)])
def test_predictions_of_whole_sentences(mask: Tensor | None) -> None:
    model = make()
    expected = reference(model, classifier, LENGTHS, None, 3, 5.0)
    check(ck.minimise_entropy(model, classifier(model, sentences()), NAMES, 3, 5.0, mask), expected, LENGTHS, 1e-12)


def test_without_keep_every_token_counts() -> None:
    model, lengths = make(), (6, 6, 6)
    expected = reference(model, tagger, lengths, None, 4, 10.0)
    check(ck.minimise_entropy(model, tagger(model, sentences(lengths)), NAMES, 4), expected, lengths, 1e-12)


def test_adapters_that_some_layers_lack() -> None:
    model, names, lengths = make(leave_out=[0]), ("sv", "da"), (6, 5)
    ck.inject(model, ck.CompacterConfig(**ALONE), name="da")
    with torch.no_grad():
        for _, p in ck.adapter_parameters(model, "da"):
            p.normal_(std=0.5, generator=torch.Generator().manual_seed(5))
    model.double()
    keep = sentences(lengths)["attention_mask"].bool()
    logits, weights = ck.minimise_entropy(model, tagger(model, sentences(lengths)), names, 2, keep=keep)
    assert weights.shape == (2, 4, 2)
    for row, length in enumerate(lengths):
        batch = {key: value[row : row + 1, :length] for key, value in sentences(lengths).items()}
        own, alone = ck.minimise_entropy(model, tagger(model, batch), names, 2)
        assert (own[0] - logits[row, :length]).abs().max() < 1e-12 and (alone[0] - weights[row]).abs().max() < 1e-12


def test_no_step() -> None:
    model = make()
    logits, weights = ck.minimise_entropy(model, tagger(model, sentences()), NAMES, steps=0, keep=some_kept())
    assert torch.equal(weights, torch.full((4, 4, 3), 0.5).double().softmax(-1))
    with torch.no_grad(), ck.mix(model, NAMES, torch.full((3,), 1 / 3, dtype=torch.float64)):
        assert (logits - tagger(model, sentences())()).abs().max() < 1e-12


def test_one_adapter_keeps_all_the_weight() -> None:
    model = make()
    logits, weights = ck.minimise_entropy(model, tagger(model, sentences()), ["sv"], keep=some_kept())
    ck.set_adapter(model, "sv")
    assert torch.equal(weights, torch.ones(4, 4, 1).double())
    assert (logits - tagger(model, sentences())()).abs().max() < 1e-12


def test_a_sentence_without_kept_tokens_keeps_equal_weights() -> None:
    model, keep = make(), some_kept()
    expected = ck.minimise_entropy(model, tagger(model, sentences()), NAMES, keep=keep)[1]
    weights = ck.minimise_entropy(
        model, tagger(model, sentences()), NAMES, keep=keep & torch.tensor([[1], [0], [1], [1]]).bool()
    )[1]
    assert torch.equal(weights[1], torch.full((4, 3), 0.5).double().softmax(-1))
    assert (weights - expected)[[0, 2, 3]].abs().max() < 1e-12


def test_classes_with_the_logit_minus_infinity() -> None:
    model = make()
    never = torch.zeros(CLASSES).double()
    never[-2:] = -torch.inf

    def fewer() -> Tensor:
        return tagger(model, sentences())()[..., :-2]

    expected = ck.minimise_entropy(model, fewer, NAMES, keep=some_kept())
    logits, weights = ck.minimise_entropy(model, lambda: tagger(model, sentences())() + never, NAMES, keep=some_kept())
    assert (weights - expected[1]).abs().max() < 1e-12 and (logits[..., :-2] - expected[0]).abs().max() < 1e-12


def test_the_entropy_falls() -> None:
    model, keep = make(), some_kept()

    def entropy(steps: int) -> float:
        logits, _ = ck.minimise_entropy(model, tagger(model, sentences()), NAMES, steps, 0.5, keep)
        return torch.distributions.Categorical(logits=logits).entropy()[keep].mean().item()

    values = [entropy(steps) for steps in (0, 1, 10, 40)]
    assert values == sorted(values, reverse=True)


@contextmanager
def nothing_changes(model: nn.Module) -> Iterator[None]:
    """The parameters, their gradients, whether they train and the modes of modules stay."""
    ck.set_adapter(model, ["de", "sv"])
    model.classifier.requires_grad_()
    with ck.route(model, ["de", "sv", None, "de"]):
        tagger(model, sentences())().square().sum().backward()
    model.bert.encoder.layer[0].train()

    def state() -> list[Any]:
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        return [[p.requires_grad for p in model.parameters()], [m.training for m in model.modules()], grads,
                [p.detach().clone() for p in model.parameters()]]  # fmt: skip

    before = state()
    yield
    after = state()
    assert before[:2] == after[:2] and any(before[0])
    for old, new in zip([*before[2], *before[3]], [*after[2], *after[3]], strict=True):
        assert (old is None) == (new is None) and (old is None or torch.equal(old, new))
    with ck.route(model, ["de", "sv", None, "de"]):  # No context is left.
        tagger(model, sentences())()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_and_the_gradient_mode_stay(context: Any) -> None:
    model, batch, seen = make(), sentences(), list[bool]()

    def forward() -> Tensor:
        seen.extend(p.requires_grad for p in model.parameters())
        return tagger(model, batch)()

    expected = ck.minimise_entropy(model, forward, NAMES, keep=some_kept())
    with nothing_changes(model), context():
        batch = sentences()
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        actual = ck.minimise_entropy(model, forward, NAMES, keep=some_kept())
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert not any(seen)


@pytest.mark.parametrize("call", [1, 3])
def test_an_exception_leaves_the_model_as_it_was(call: int) -> None:
    model, calls = make(), list[int]()

    def forward() -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise KeyError("no batch")
        return tagger(model, sentences())()

    with nothing_changes(model):
        with pytest.raises(KeyError, match="no batch"):
            ck.minimise_entropy(model, forward, NAMES, 2, keep=some_kept())
        assert torch.is_grad_enabled()


def test_a_model_of_peft() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from peft_models import add, wrapped

    options: dict[str, Any] = {"train_layer_norms": False, "modules_to_save": []}
    model, batch = wrapped(build("bert", **QUIET), "de", 1, **options), sentences()
    add(model, "sv", 2, **options).double().eval()
    trained = [p.requires_grad for p in model.parameters()]
    logits, weights = ck.minimise_entropy(model, lambda: model(**batch).logits, ["de", "sv"], 3, 1000.0)
    assert trained == [p.requires_grad for p in model.parameters()] and any(trained)
    with torch.no_grad(), ck.mix(model, ["de", "sv"], weights):
        assert (logits - model(**batch).logits).abs().max() < 1e-12
    assert weights.shape == (4, 4, 2) and (weights - 0.5).abs().max() > 1e-3


NONE = torch.zeros(4, 7)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a name": ({"adapters": "de"}, TypeError, "adapters must be names of adapters, got 'de'"),
    "no names": ({"adapters": []}, ValueError, "must be different names, at least one"),
    "unknown": ({"adapters": ["de", "da"]}, ValueError, "minimise_entropy: the model has no adapters da; it has de"),
    "forward": ({"forward": NONE}, TypeError, "forward must be a function that runs the model, got Tensor"),
    "steps": ({"steps": -1}, ValueError, "steps must be an integer >= 0, got -1"),
    "half a step": ({"steps": 0.5}, ValueError, "steps must be an integer >= 0, got 0.5"),
    "lr": ({"lr": 0.0}, ValueError, "lr must be a finite number > 0, got 0.0"),
    "infinite lr": ({"lr": float("inf")}, ValueError, "lr must be a finite number > 0, got inf"),
    "keep of ints": ({"keep": NONE.long()}, TypeError, "keep must be a tensor of bools, got torch.int64"),
    "keep of one": ({"keep": NONE[0, 0].bool()}, ValueError, r"the shape \(B, S\), or \(B,\), .*got \(\)"),
}  # fmt: skip
RETURNED: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "no tensor": (lambda y: (y,), TypeError, "forward must return logits, a tensor of floats, got tuple"),
    "numbers": (lambda y: y.argmax(-1), TypeError, "forward must return logits, a tensor of floats, got torch.int64"),
    "shape": (lambda y: y[..., None], ValueError, r"of the shape \(B, S, classes\) .*got \(4, 7, 5, 1\)"),
    "fewer": (lambda y: y[:2], ValueError, r"keep has the shape \(4, 7\), and forward returned \(2, 7, 5\)"),
    "no graph": (lambda y: y.detach(), ValueError, "the logits of forward have no graph"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_before_work(case: str) -> None:
    arguments, kind, match = REFUSED[case]
    model, calls = make(), list[int]()
    with nothing_changes(model), pytest.raises(kind, match=match):
        ck.minimise_entropy(model, **{"forward": lambda: calls.append(1), "adapters": NAMES, **arguments})
    assert not calls


@pytest.mark.parametrize("case", RETURNED)
def test_errors_of_what_forward_returns(case: str) -> None:
    change, kind, match = RETURNED[case]
    model = make()
    with nothing_changes(model), pytest.raises(kind, match=match):
        ck.minimise_entropy(model, lambda: change(tagger(model, sentences())()), NAMES, keep=some_kept())


def test_models_that_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match=r"has no adapters; call .*inject first"):
        ck.minimise_entropy(build("bert"), lambda: NONE, ["de"])
    copies = ck.inject(build("bert", **QUIET), ck.CompacterConfig(reduction_factor=4), name="de")
    with pytest.raises(ValueError, match="set train_layer_norms=False and modules"):
        ck.minimise_entropy(copies, classifier(copies, sentences()), ["de"])
    model = make()
    with ck.route(model, ["de"] * 4), pytest.raises(RuntimeError, match="leave it before minimise_entropy"):
        ck.minimise_entropy(model, classifier(model, sentences()), ["de"])
