"""Models with LoKr of peft under ck.patch: compiled, copied, checkpointed, in memory, reversed."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lokr_layers import SETUPS, assert_within_contract, batch, exact_step, layer, make, patched, peft, step
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from two_processes import run_two

import compacter_kernels as ck
from compacter_kernels import call_path, functional
from compacter_kernels.dispatch import ENVIRONMENT
from compacter_kernels.impl import chain
from compacter_kernels.patch import patch as patch_module
from compacter_kernels.saved import saved_bytes

pytestmark = [
    # torch.compile gives these warnings
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(params=["auto", "factored", "seen by torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fused kernel where it serves; the chain of products; that chain where torch sees them."""
    if request.param != "auto":
        monkeypatch.setenv(ENVIRONMENT, "factored")
        monkeypatch.setattr(chain, "alone", lambda: request.param == "factored")
    return str(request.param)


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **options})


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made, except views."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", [{}, {"rank_dropout": 0.5, "module_dropout": 0.1}], ids=["plain", "dropout"])
@pytest.mark.parametrize("setup", SETUPS)
def test_no_matrix_of_the_size_of_the_weight(setup: str, options: dict[str, Any]) -> None:
    model = make(setup, count=2, **options).train()
    size = layer(model).base_layer.weight.numel()
    x, grad = batch(model, leading=(2,))
    largest = []
    for one in (model, patched(model)):
        known = [*one.parameters(), x, grad]
        with Largest(known) as mode:
            step(one, x, grad, seed=2)
        largest.append(mode.largest)
    assert largest[0] >= size  # the test sees what peft makes
    assert largest[1] < size


@pytest.mark.parametrize("setup", SETUPS)
def test_nothing_of_that_size_is_saved(setup: str, way: str) -> None:
    model = make(setup, alpha=SETUPS[setup][2]["r"])
    x, _ = batch(model, leading=(2,))
    x.requires_grad_()
    size = layer(model).base_layer.weight.nbytes
    saved = [saved_bytes(lambda m=m: m(x), (*m.parameters(), x)) for m in (model, patched(model))]
    assert saved[0] >= size
    assert saved[1] < size
    if way != "seen by torch" and "w1" not in setup and "number" not in setup:
        assert saved[1] == 0  # x and the parameters alone


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("setup", ["low rank", "whole w2", "factorised w1"])
def test_compiles_without_a_break(setup: str, training: bool) -> None:
    """In training, peft alone does not: it branches on a random number."""
    model = make(setup, count=2).train(training)
    x, grad = batch(model)
    got = step(compiled(patched(model)), x, grad)
    assert_within_contract(got, step(model, x, grad), exact_step(model, x, grad))


def test_compiled_under_autocast() -> None:
    model = make(rank_dropout=0.4).eval()
    x, grad = batch(model)
    got = step(compiled(patched(model)), x, grad, autocast=torch.bfloat16)
    assert_within_contract(got, step(model, x, grad, autocast=torch.bfloat16), exact_step(model, x, grad))


@pytest.mark.parametrize("dropout", ["rank_dropout", "module_dropout"])
def test_compiled_dropout(dropout: str) -> None:
    """With the backend "eager", the compiled model draws the numbers that peft draws."""
    model = make(**{dropout: 0.5}).train()
    x, _ = batch(model)
    again = compiled(patched(model), backend="eager")
    outputs = []
    for seed in range(8):
        found = []
        for one in (model, again):
            torch.manual_seed(seed)
            if one is again and dropout == "rank_dropout":
                torch.rand(1)  # which peft draws for a module dropout of 0 too
            found.append(one(x).detach())
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        outputs.append(found[1])
    assert any(not torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["low rank", "whole w2"])
def test_compiled_by_inductor(setup: str) -> None:
    model = make(setup).train()
    again = compiled(patched(model), backend="inductor", dynamic=True)
    for leading in ((3, 5), (2, 7)):
        x, grad = batch(model, leading=leading)
        got = step(again, x, grad)
        assert_within_contract(got, step(model, x, grad), exact_step(model, x, grad))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    model = make(rank_dropout=0.4, module_dropout=0.3).train()
    again, (x, grad) = patched(model), batch(model)
    expected = step(again, x, grad)
    forward = again.forward
    again.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    got = step(again, x, grad)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("setup", ["low rank", "factorised w1", "whole w2"])
def test_the_output_of_the_base_is_added_in_the_same_call(setup: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Low rank is a call of the fused kernel where it is built, and a whole w2 of the chain."""
    model = patched(make(setup, count=2))
    x, _ = batch(model)
    calls, run = [], call_path.run

    def recorded(call: Any, *args: Any) -> Tensor:
        explanation = call_path.explain(call, *args)
        calls.append((call.base is not None, explanation.impl))
        return run(call, *args)

    monkeypatch.setattr(functional, "_run", recorded)
    model(x)
    low_rank = "cpu" if ck.available_impls()["cpu"] is None else "factored"
    assert calls == 2 * [(True, "factored" if setup == "whole w2" else low_rank)]


def test_second_derivatives_through_the_fused_kernel_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(make())
    x, _ = batch(model)
    x.requires_grad_()

    def twice() -> Tensor:
        (first,) = torch.autograd.grad(model(x).square().sum(), [x], create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x])[0]

    if ck.available_impls()["cpu"] is None:
        with pytest.raises(RuntimeError, match=r"no second derivative.*impl='factored'"):
            twice()
    monkeypatch.setenv(ENVIRONMENT, "factored")
    assert twice().abs().sum() > 0


def test_training_gives_the_same_losses() -> None:
    model = make(count=2, rank_dropout=0.1).double().train()
    x, target = batch(model, torch.float64, (16,))
    curves = []
    for one in (model, patched(model)):
        torch.manual_seed(5)
        optimizer, losses = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2), []
        for _ in range(20):
            loss = (one(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)
    assert curves[0][-1] < 0.9 * curves[0][0]


def test_unpatch_restores_bitwise() -> None:
    model = make("whole w2", count=2)
    x, grad = batch(model)
    attributes, expected, state = set(vars(layer(model))), step(model, x, grad), list(model.state_dict())
    parameters = list(model.parameters())
    report = ck.patch(model)
    assert report.patched == (("base_model.model.0", "LoKr from its factors"),)
    assert not report.skipped
    assert ck.patch(model) == report  # again
    assert list(model.state_dict()) == state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not torch.equal(step(model, x, grad)["y"], expected["y"])  # it rounds differently
    assert ck.unpatch(model).restored == (("base_model.model.0", "forward"),)
    assert set(vars(layer(model))) == attributes
    actual = step(model, x, grad)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies(duplicate: Any) -> None:
    model = patched(make())
    again, (x, _) = duplicate(model), batch(model)
    expected = model(x)
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        layer(again).lokr_w1["a"].zero_()
    assert torch.equal(model(x), expected)
    assert not torch.equal(again(x), expected)
    assert len(ck.unpatch(again).restored) == len(ck.unpatch(model).restored) == 1


def test_adapters_are_saved_and_loaded_as_by_peft(tmp_path: Path) -> None:
    model = make()
    again, (x, _) = patched(model), batch(model)
    for name, one in (("shipped", model), ("patched", again)):
        one.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "a" / "adapter_model.safetensors").read_bytes() for name in ("shipped", "patched")]
    assert files[0] == files[1]
    with torch.no_grad():
        layer(again).lokr_w1["a"].zero_()
    again.load_adapter(str(tmp_path / "shipped" / "a"), "b")
    again.set_adapter("b")
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 1)
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).flatten(2)).mT)


def test_convolutions_stay_as_they_are_and_are_reported() -> None:
    config = peft.LoKrConfig(r=2, target_modules=["first", "second", "last"], init_weights=False)
    model = peft.get_peft_model(_Convolutions(), config)
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    report = ck.patch(model)
    assert report.skipped == (
        ("base_model.model.first", "LoKr of a Conv2d: `peft` builds its matrix"),
        ("base_model.model.second", "LoKr of a Conv1d: `peft` builds its matrix"),
    )
    assert [name for name, _ in report.patched] == ["base_model.model.last"]
    assert "forward" not in vars(model.base_model.model.first)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_layers_that_somebody_changed_are_left_and_reported() -> None:
    class Own(type(layer(make()))):  # type: ignore[misc]
        def get_delta_weight(self, *args: Any, **options: Any) -> Tensor:
            return 2 * super().get_delta_weight(*args, **options)

    model = make()
    layer(model).__class__ = Own
    assert ck.patch(model).skipped == (("base_model.model.0", "Own has a forward of its own"),)
    model = make()
    layer(model)._get_delta_activations = lambda name, x: x.new_zeros(())
    assert ck.patch(model).skipped == (("base_model.model.0", "its forward was replaced on the module"),)


def test_a_layer_whose_forward_is_wrapped_later() -> None:
    model = make()
    hook = pytest.importorskip("accelerate.hooks")
    x, _ = batch(model)
    expected = patched(model)(x)
    again = patched(model)
    hook.add_hook_to_module(layer(again), hook.ModelHook())
    assert torch.equal(again(x), expected)
    assert "remove that hook first" in ck.unpatch(again).skipped[0].what
    hook.remove_hook_from_module(layer(again))
    assert torch.equal(again(x), expected)
    assert len(ck.unpatch(again).restored) == 1


def test_hooks_of_the_layer_run() -> None:
    model = make()
    for one in (layer(model), layer(model).base_layer):
        one.register_forward_hook(lambda module, args, output: output + 1)
    x, _ = batch(model)
    torch.testing.assert_close(patched(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_version_of_peft_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.99.0")
    model = make()
    with pytest.raises(RuntimeError, match=r"peft 0\.99\.0 is not known to ck\.patch, .*0\.18 to 0\.21; install"):
        ck.patch(model)
    assert "forward" not in vars(layer(model))


def test_a_model_of_peft_without_lokr() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="It has no LoKr layer of `peft` either"):
        ck.patch(model)
    assert patch_module.LOKR  # the name of the file that only a model with LoKr imports


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = patched(make("whole w2", count=2))
    x, target = batch(model, leading=(8,))
    parallel = nn.parallel.DistributedDataParallel(model)
    (parallel(x.chunk(2)[rank]) - target.chunk(2)[rank]).square().mean().backward()
    del parallel  # two_processes.py
    torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_two(_worker, str(tmp_path))
    torch.manual_seed(0)
    model = patched(make("whole w2", count=2))
    x, target = batch(model, leading=(8,))
    (model(x) - target).square().mean().backward()
    for rank in range(2):
        for name, grad in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
