"""ck.route and ck.mix: a batch of several adapters equals a run for each, with all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import WORDS, build, inputs
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.inject.target_adapters import TargetAdapters
from compacter_kernels.inject.trained_copies import TrainedCopies

NAMES: list[str | None] = ["de", None, "sv", "de"]
ALONE = {"train_layer_norms": False, "modules_to_save": []}
QUIET: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "add_cross_attention": False},
    "llama": {},
    "whisper": {"dropout": 0.0},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "adapters alone": ALONE,
    "parallel": {"is_parallel": True, "scaling": 2.0},
    "before the norm": {"original_ln_before": True},
    "residual of the norm": {"original_ln_before": True, "residual_before_ln": False},
    "all shared": {"shared_W_phm": True, "scaling": "learned"},
    "own rules": {"shared_phm_rule": False, "factorized_phm_W": False},
    "norms": {"ln_before": True, "ln_after": True},
}


def config(**options: Any) -> ck.CompacterConfig:
    return ck.CompacterConfig(**{"reduction_factor": 4, **options})


def drawn(model: nn.Module, name: str) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for _, p in sorted(ck.adapter_parameters(model, name)):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)


def make(family: str = "bert", seconds: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """A model in float64 with three adapters that matter, of which two are trained.

    seconds: other options of the adapters "sv".
    """
    model = build(family, **QUIET[family]).double()
    for name in ("de", "sv", "nl"):
        more = seconds if name == "sv" and seconds is not None else {}
        ck.inject(model, config(**{**options, **more}), name=name)
        drawn(model, name)
    ck.set_adapter(model, ["de", "sv"])
    return model.train()


def batch_of(family: str, count: int = len(NAMES)) -> dict[str, Tensor]:
    given = inputs("llama" if family == "gpt2" else family, count)
    return {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(actual: Tensor, expected: Tensor, limit: float = 1e-9) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= limit * expected.abs().max().clamp(min=1)


def alone(model: nn.Module, name: str | None, batch: dict[str, Tensor]) -> Tensor:
    """The output where all samples have that adapter."""
    if name is None:
        with ck.disable_adapters(model):
            return model(**batch)[0]
    ck.set_adapter(model, [name, *({"de", "sv"} - {name})])
    return model(**batch)[0]


def apart(model: nn.Module, batch: dict[str, Tensor], names: list[str | None]) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs of a run for each sample, and the gradients of their squares."""
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(names))]
    outputs = [alone(model, name, own) for name, own in zip(names, rows, strict=True)]
    expected = torch.cat(outputs)
    torch.stack([out.square().sum() for out in outputs if out.requires_grad]).sum().backward()
    ck.set_adapter(model, ["de", "sv"])
    return expected.detach(), gradients(model)


def check(actual: Tensor, model: nn.Module, expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    close(actual.detach(), expected[0])
    actual.square().sum().backward()
    grads = gradients(model)
    assert grads.keys() == expected[1].keys()
    assert not any(".nl." in name for name in grads)
    for name, grad in expected[1].items():
        close(grads[name], grad)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_samples_get_their_adapters(family: str, options: str) -> None:
    model, batch = make(family, **OPTIONS[options]), batch_of(family)
    expected = apart(model, batch, NAMES)
    with ck.route(model, NAMES):
        check(model(**batch)[0], model, expected)
    with ck.route(model, torch.tensor([1, -1, 0, 1]), names=["sv", "de", "nl"]):
        close(model(**batch)[0], expected[0])
    numbers = torch.nn.functional.one_hot(torch.tensor([0, 2, 1, 0]), 3)[:, :2].double()
    if "norms" not in options and options != "residual of the norm":
        with ck.mix(model, ["de", "sv"], numbers):
            check(model(**batch)[0], model, expected)


OTHERS: dict[str, dict[str, Any]] = {
    "sizes": {"reduction_factor": 8},
    "activation": {"non_linearity": "relu"},
    "scaling": {"scaling": "learned"},
    "layers": {"leave_out": [0]},
    "heads": ALONE,
    "inputs": {"is_parallel": True},
}


@pytest.mark.parametrize("options", OTHERS)
def test_adapters_of_other_options(options: str) -> None:
    model, batch = make("bert", OTHERS[options]), batch_of("bert")
    expected = apart(model, batch, NAMES)
    with ck.route(model, NAMES):
        check(model(**batch)[0], model, expected)
    with ck.mix(model, ["de", "sv"], torch.tensor([0.0, 1.0])):
        close(model(**batch)[0], alone(model, "sv", batch))


def test_each_token_has_an_adapter() -> None:
    """Adapters after the last layer alone, so that no token sees what another one's adapter did."""
    model, batch = make("llama", **ALONE, leave_out=[0], mh_adapter=False), batch_of("llama")
    ids = torch.tensor([[0, 1, -1, 1, 0, 0], [-1] * 6, [1, 1, 0, 0, -1, 1], [0] * 6])
    with ck.route(model, ids, names=["de", "sv"]):
        actual = model(**batch)[0]
    of_each = {-1: alone(model, None, batch), 0: alone(model, "de", batch), 1: alone(model, "sv", batch)}
    for row in range(4):
        for token in range(6):
            close(actual[row, token], of_each[int(ids[row, token])][row, token])


def test_samples_without_an_adapter_are_those_of_the_base() -> None:
    model, batch = make(), batch_of("bert")
    model.float()
    base = alone(model, None, batch)
    ck.set_adapter(model, ["de", "sv"])
    with ck.route(model, [None] * 4):
        assert torch.equal(model(**batch)[0], base)
    with ck.route(model, NAMES):
        torch.testing.assert_close(model(**batch)[0][1], base[1], rtol=1e-4, atol=1e-5)
        with ck.disable_adapters(model):
            assert torch.equal(model(**batch)[0], base)


@pytest.mark.parametrize("layer_norms", [False, True])
@pytest.mark.parametrize("shape", ["(K,)", "(B, K)", "(B, layers, K)", "(1, layers, K)"])
def test_mixed(shape: str, layer_norms: bool) -> None:
    """Hooks on the base compute the definition."""
    if layer_norms and "layers" in shape:
        pytest.skip("refused")
    model, batch = make("bert", **({} if layer_norms else ALONE)), batch_of("bert")
    reference, places = copy.deepcopy(model), 0
    w = {"(K,)": torch.randn(2), "(B, K)": torch.randn(4, 2)}.get(shape)
    w = torch.randn(4 if "B" in shape else 1, 4, 2) if w is None else w
    w = w.double().requires_grad_()

    def hook(holder: Any, place: int) -> Any:
        def mixed(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            own = w if w.ndim < 3 else w[:, place]
            own = own.reshape(own.shape[:-1] + (1,) * (y.ndim - own.ndim + 1) + (2,))
            x = args[0] if isinstance(holder, TrainedCopies) else y
            return y + sum(own[..., i] * (holder[name](x) - y) for i, name in enumerate(("de", "sv")))

        return mixed

    for name, holder in list(reference.named_modules()):
        if isinstance(holder, TargetAdapters | TrainedCopies):
            module = reference.get_submodule(name.rpartition(".")[0])
            module.register_forward_hook(hook(holder, places))
            places += isinstance(holder, TargetAdapters)
    with ck.disable_adapters(reference):
        expected = reference(**batch)[0]
    expected.square().sum().backward()
    of_w, w.grad = w.grad, None
    with ck.mix(model, ["de", "sv"], w):
        check(model(**batch)[0], model, (expected.detach(), gradients(reference)))
    close(w.grad, of_w)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(family: str, beams: int) -> None:
    """The encoder gets a sample once, the decoder once for each beam."""
    model = make(family).float().eval()
    tokens = torch.randint(3, WORDS, (4, 6), generator=torch.Generator().manual_seed(5))

    def generate() -> Tensor:
        sizes = {"max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(input_ids=tokens, do_sample=False, num_beams=beams, **sizes)

    with ck.route(model, NAMES):
        mixed = generate()
    for row, name in enumerate(NAMES):
        if name is None:
            with ck.disable_adapters(model):
                own = generate()
        else:
            ck.set_adapter(model, name)
            own = generate()
        assert torch.equal(mixed[row], own[row])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """The forward is computed again outside of the context, with the same adapters."""
    model, batch = make(family), batch_of(family)
    expected = apart(model, batch, NAMES)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with ck.route(model, NAMES):
        actual = model(**batch)[0]
    ck.set_adapter(model, ["de", "sv"])
    check(actual, model, expected)
    functions = [
        vars(m)["_gradient_checkpointing_func"] for m in model.modules() if hasattr(m, "gradient_checkpointing")
    ]
    assert functions and all("choose" not in getattr(f.func, "__module__", "") for f in functions)


@pytest.mark.parametrize("options", [{}, ALONE], ids=["default", "adapters alone"])
def test_compile(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, batch = make("bert", **options), batch_of("bert")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(**batch)[0], model(**batch)[0])
    expected = apart(model, batch, NAMES)
    with ck.route(model, NAMES):
        check(compiled(**batch)[0], model, expected)
    with torch._dynamo.config.patch(error_on_recompile=True), ck.route(model, ["sv", "de", None, None]):
        close(compiled(**batch)[0], model(**batch)[0])
    w = torch.rand(4, 2).double().requires_grad_()
    with ck.mix(model, ["de", "sv"], w):
        compiled(**batch)[0].square().sum().backward()
        of_w, w.grad = w.grad, None
        model(**batch)[0].square().sum().backward()
    close(of_w, w.grad)
    close(compiled(**batch)[0], model(**batch)[0])


def test_a_projection_with_hooks_is_called() -> None:
    model, batch = make("bert", **ALONE), batch_of("bert")
    for module in model.modules():
        if isinstance(module, TargetAdapters):
            module["sv"].down.register_forward_hook(lambda m, args, out: out * 2)
    expected = apart(model, batch, NAMES)
    with ck.route(model, NAMES):
        check(model(**batch)[0], model, expected)
    numbers = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).double()
    with ck.mix(model, ["de", "sv"], numbers):
        check(model(**batch)[0], model, expected)


def test_training_needs_no_more_than_the_names() -> None:
    """An optimizer of both adapters moves those that occur and no others."""
    model, batch = make(), batch_of("bert")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with ck.route(model, ["sv", None, "sv", None]):
        loss = model(**batch)[0].square().sum()
    loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".sv." in name for name in moved)


def test_several_adapters_are_trained() -> None:
    model = make()
    assert {name.split(".")[-3] if "down" in name or "up" in name else "" for name, p in model.named_parameters()
            if p.requires_grad} >= {"de", "sv"}  # fmt: skip
    ck.set_adapter(model, "nl")
    assert all(".nl." in name for name, p in model.named_parameters() if p.requires_grad)
    for wrong, match in (([], "name is empty"), (["de", "da"], "no adapters of the name 'da'")):
        with pytest.raises(ValueError, match=match):
            ck.set_adapter(model, wrong)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": (lambda m: ck.route(m, ["de", "da"]), ValueError, "route: the model has no adapters da; it has de, sv"),
    "a string": (lambda m: ck.route(m, "de"), TypeError, "adapters must be one name for each sample, got 'de'"),
    "no names": (lambda m: ck.route(m, torch.tensor([0])), ValueError, "names= must say whose they are"),
    "names twice": (lambda m: ck.route(m, ["de"], names=["de"]), ValueError, "names goes with a tensor of numbers"),
    "numbers": (lambda m: ck.route(m, torch.tensor([0, 2]), names=["de"]), ValueError, "from 0 to 2, but names has 1"),
    "floats": (lambda m: ck.route(m, torch.zeros(2), names=["de"]), TypeError, "must be int64 or int32 of the shape"),
    "mix nothing": (lambda m: ck.mix(m, [], torch.zeros(0)), ValueError, "must be different names, at least one"),
    "mix twice": (lambda m: ck.mix(m, ["de", "de"], torch.zeros(2)), ValueError, "must be different names"),
    "mix a string": (lambda m: ck.mix(m, "de", torch.zeros(2)), TypeError, "adapters must be names of adapters"),
    "weights": (lambda m: ck.mix(m, ["de"], [1.0]), TypeError, "weights must be a tensor of floats, got list"),
    "shape": (lambda m: ck.mix(m, ["de"], torch.ones(2)), ValueError, r"the shape \(1,\), \(B, 1\) or \(B, layers, 1"),
    "layers": (lambda m: ck.mix(m, ["de"], torch.ones(1, 3, 1)), ValueError, "are for 3 layers; the adapters are at 4"),
    "copies": (lambda m: ck.mix(m, ["de"], torch.ones(1, 4, 1)), ValueError, "set train_layer_norms=False and modules"),
    "no adapters": (lambda m: ck.route(build("bert"), ["de"]), ValueError, "has no adapters; call .*inject first"),
    "batch second": (
        lambda m: ck.route(ck.inject(nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64)),
                                     config(target_modules=["linear2"])), ["default"]),
        ValueError, "make the model with batch_first=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_errors(case: str) -> None:
    function, kind, match = REFUSED[case]
    model = make()
    with pytest.raises(kind, match=match), function(model):
        pass
    with ck.route(model, NAMES):  # The failed one has left nothing.
        model(**batch_of("bert"))


def test_errors_in_the_context() -> None:
    model = make()
    with ck.route(model, NAMES):
        with pytest.raises(ValueError, match="chosen for 4 samples, and a module got 6"):
            model(**batch_of("bert", 6))
        for again in (ck.route(model, NAMES), ck.mix(model, ["de"], torch.ones(1))):
            with pytest.raises(RuntimeError, match="in a context of route or mix already"), again:
                pass
        with pytest.raises(RuntimeError, match="leave it before you add or remove adapters"):
            ck.inject(model, ck.CompacterConfig(reduction_factor=4), name="new")
        with pytest.raises(RuntimeError, match="leave it before you add or remove adapters"):
            ck.remove_adapters(model, "de")
        model(**batch_of("bert", 8))
    normed = make(ln_before=True)
    with ck.mix(normed, ["de"], torch.ones(1)), pytest.raises(ValueError, match=r"ln_before=True: .* but not mixed"):
        normed(**batch_of("bert"))
    other = make(original_ln_before=True, residual_before_ln=False)
    with ck.mix(other, ["de"], torch.ones(1)), pytest.raises(ValueError, match="residual_before_ln=False: "):
        other(**batch_of("bert"))
