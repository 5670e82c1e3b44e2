"""Calls of the functions with a tensor of another kind as each argument.

`outcomes` makes the calls of each kind in a process of its own, since the use of an invalid address
ends the process. An outcome is "right", "wrong", or the error that was raised. Each kind is a
function of a plain tensor.
"""

from __future__ import annotations

import functools
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import compacter_kernels as ck

WIDTH, BOTTLENECK, N = 24, 12, 4
FIELDS = ("rule", "left", "right", "bias")


def two_tensor(tensor: Tensor) -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    wrapped: Tensor = TwoTensor(tensor.detach(), tensor.detach().clone())
    return wrapped


def dtensor(tensor: Tensor) -> Tensor:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: Tensor = distribute_tensor(tensor.detach(), init_device_mesh("cpu", (1,)), [Replicate()])
    return found


@functools.cache
def fake_mode() -> Any:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def fake(tensor: Tensor) -> Tensor:
    found: Tensor = fake_mode().from_tensor(tensor.detach())
    return found


def meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def freed(tensor: Tensor) -> Tensor:
    other = tensor.detach().clone()
    other.untyped_storage().resize_(0)
    return other


def shortened(tensor: Tensor) -> Tensor:
    other = tensor.detach().clone()
    other.untyped_storage().resize_(other.untyped_storage().nbytes() // 2)
    return other


def strided_and_freed(tensor: Tensor) -> Tensor:
    other = torch.stack((tensor.detach(),) * 2, -1)[..., 0]
    other.untyped_storage().resize_(0)
    return other


def sparse(tensor: Tensor) -> Tensor:
    return tensor.detach().to_sparse()


def opaque(tensor: Tensor) -> Tensor:
    return tensor.detach().to_mkldnn() if tensor.is_floating_point() else tensor


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.detach().unbind()))


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.detach(), 0.1, 0, torch.qint8) if tensor.is_floating_point() else tensor


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        *(two_tensor, dtensor, fake, meta, freed, shortened, strided_and_freed, sparse, opaque, nested, quantised),
    )
}
LINEAR = ("x", *(f"weights.{f}" for f in FIELDS))
ADAPTER = ("x", *(f"{side}.{f}" for side in ("down", "up") for f in FIELDS), "residual", "scale")
ADAPTER += ("norm.weight", "norm.bias", "out")
DENSE = ("x", "down.weight", "down.bias", "up.weight", "up.bias", "residual")
BANK = ("x", *(f"{side}.{f}" for side in ("down", "up") for f in FIELDS), "residual")


# The arguments that are tested with torch.compile. For other arguments torch compiles a plain impl
# or the copy into `out`, and these read no address. Nested tensors make torch end the process.
COMPILED = ("x", "down.left", "up.bias", "residual")


def tensors() -> dict[str, Tensor]:
    """Plain tensors for all arguments, with the same numbers in every run."""
    torch.manual_seed(0)
    found = {"x": torch.randn(5, WIDTH), "residual": torch.randn(5, WIDTH), "scale": torch.tensor([0.7])}
    for side, wide_in, wide_out in (("down", WIDTH, BOTTLENECK), ("up", BOTTLENECK, WIDTH)):
        found[f"{side}.rule"] = torch.randn(N, N, N) / 2
        found[f"{side}.left"] = torch.randn(N, wide_in // N, 1) / 2
        found[f"{side}.right"] = torch.randn(N, 1, wide_out // N) / 2
        found[f"{side}.bias"] = torch.randn(wide_out)
    found["norm.weight"], found["norm.bias"] = torch.rand(WIDTH), torch.randn(WIDTH)
    return found


def weights(given: dict[str, Tensor], side: str) -> ck.PHMWeights:
    return ck.PHMWeights(*(given[f"{side}.{field}"] for field in FIELDS))


def linear(given: dict[str, Tensor], impl: str = "auto") -> Tensor:
    named = {name.replace("weights.", "down."): tensor for name, tensor in given.items()}
    return ck.phm_linear(named["x"], weights(named, "down"), impl=impl)


def adapter(given: dict[str, Tensor], impl: str = "auto", what: str = "") -> Tensor:
    """Call the adapter with the tested argument `what`.

    A scale, a norm or an `out` is passed only if it is the tested argument.
    """
    down, up = weights(given, "down"), weights(given, "up")
    options: dict[str, Any] = {"residual": (given["x"], given["residual"])}
    if what == "scale":
        options["scale"] = given["scale"]
    if what.startswith("norm"):
        options["norm"] = ck.NormWeights(given["norm.weight"], given["norm.bias"])
    if what == "out":
        options["out"] = given["out"]
    return ck.compacter_adapter(given["x"], down, up, impl=impl, **options)


def bottleneck(given: dict[str, Tensor], impl: str = "auto") -> Tensor:
    sides = (ck.LinearWeights(given[f"{side}.weight"], given[f"{side}.bias"]) for side in ("down", "up"))
    return ck.bottleneck_adapter(given["x"], *sides, residual=given["residual"], impl=impl)


def routed(given: dict[str, Tensor], impl: str = "auto") -> Tensor:
    chosen = {"route": given["route"], "residual": given["residual"], "impl": impl}
    return ck.compacter_adapter_bank(given["x"], weights(given, "down"), weights(given, "up"), **chosen)


def mixed(given: dict[str, Tensor], impl: str = "auto") -> Tensor:
    chosen = {"mix": given["mix"], "residual": given["residual"], "impl": impl}
    return ck.compacter_adapter_bank(given["x"], weights(given, "down"), weights(given, "up"), **chosen)


def bank() -> dict[str, Tensor]:
    """Plain tensors for a bank of two adapters."""
    found = tensors()
    found = {name: torch.stack((t, 2 * t)) if "." in name else t for name, t in found.items()}
    return found | {"route": torch.tensor([0, 1, -1, 1, 0]), "mix": torch.randn(5, 2)}


def dense() -> dict[str, Tensor]:
    """Plain tensors for dense projections."""
    found = tensors() | {"down.weight": torch.randn(WIDTH, BOTTLENECK), "up.weight": torch.randn(BOTTLENECK, WIDTH)}
    return {name: found[name] for name in DENSE}


def plain(tensor: Tensor) -> Tensor:
    """The plain tensor that a result of another class represents."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return getattr(tensor, "a", tensor)


def outcome(call: Callable[[], list[Tensor]], expected: list[Tensor]) -> str:
    try:
        got = [plain(tensor) for tensor in call()]
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "right" if all(map(close, got, expected)) else "wrong"


def close(got: Tensor, expected: Tensor) -> bool:
    if got.is_meta or hasattr(got, "fake_mode"):  # it has no numbers
        return got.shape == expected.shape
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def calls(
    function: Callable[..., Tensor], name: str, impl: str, given: dict[str, Tensor], foreign: Any
) -> Iterator[Any]:
    """The name of each kind of call, and a function that makes the call.

    It returns the output and, if gradients are recorded, the gradient of x or of W_left.
    """
    options = {"what": name} if function is adapter else {}

    def once() -> list[Tensor]:
        with torch.no_grad():
            return [function(given, impl, **options)]

    def recorded() -> list[Tensor]:
        other = "weights.left" if function is linear else "up.weight" if function is bottleneck else "up.left"
        other = "x" if name == other or name.endswith("left") else other
        leaf = given[other].detach().requires_grad_()
        out = function({**given, other: leaf}, impl, **options)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaf)]

    def compiled() -> list[Tensor]:
        torch._dynamo.reset()
        try:
            with torch.no_grad():
                return [torch.compile(function, backend="eager")(given, impl, **options)]
        except AssertionError as error:  # raised by torch, for example for a FakeTensor
            raise RuntimeError(error) from error

    yield "no grad", once
    if name != "out":
        yield "grad", recorded
    if name in COMPILED and impl == "auto" and foreign is not nested:
        yield "compiled", compiled


def functions(kind: str) -> dict[str, str]:
    """The outcome of each call with one argument of that kind, and with all of them."""
    found = {}
    foreign = KINDS[kind]
    single = tensors() | {"out": torch.zeros(5, WIDTH)}
    single |= {name.replace("down.", "weights."): t for name, t in single.items() if name.startswith("down.")}
    all_calls: tuple[Any, ...] = ((linear, LINEAR, single), (adapter, ADAPTER, single), (bottleneck, DENSE, dense()))
    all_calls += ((routed, (*BANK, "route"), bank()), (mixed, (*BANK, "mix"), bank()))
    for function, names, plain_tensors in all_calls:
        for impl in ("auto", "factored") if function in (linear, adapter) else ("auto",):
            for name in (*names, "all"):
                if name == "route" and foreign in (opaque, quantised):
                    continue  # they have no integers
                base = {n: t.clone() for n, t in plain_tensors.items()}
                given = {n: foreign(t) if name in (n, "all") else t for n, t in base.items()}
                plain_calls = dict(calls(function, name, impl, base, foreign))
                for how, call in calls(function, name, impl, given, foreign):
                    expected = plain_calls["no grad" if how == "compiled" else how]()
                    found[f"{function.__name__} {impl} {name} {how}"] = outcome(call, expected)
    return found


def modules(kind: str) -> dict[str, str]:
    """The outcome of calls of a module with one parameter of that kind."""
    found = {}
    for name in ("down.W_left", "up.W_right", "down.phm_rule", "up.b"):
        module = ck.CompacterAdapter(WIDTH, reduction_factor=2)
        x = torch.randn(5, WIDTH)
        expected = [module(x).detach()]
        owner, _, field = name.rpartition(".")
        part = module.get_submodule(owner)
        value = KINDS[kind](getattr(part, field))
        try:
            part._parameters[field] = nn.Parameter(value, requires_grad=False)
        except RuntimeError:
            continue  # torch makes no parameter of this kind
        with torch.no_grad():
            found[name] = outcome(lambda module=module, x=x: [module(x)], expected)
    return found


def sharded() -> dict[str, str]:
    """Call an adapter of a model that FSDP2 has sharded, with its weights gathered and without."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Sequential(ck.CompacterAdapter(WIDTH, reduction_factor=2), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(5, WIDTH)
    expected = [model[0](x).detach()]
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(x)
    found = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model.unshard()
            found[f"gathered {grad}"] = outcome(lambda: [model[0](x).detach()], expected)
            model.reshard()
            found[f"sharded {grad}"] = outcome(lambda: [model[0](x).detach()], expected)
    return found


def outcomes(kind: str) -> dict[str, str]:
    """The outcome of each call, by its name; "sharded" is a kind too.

    Raises:
        RuntimeError: the process ended.
    """
    import torch._dynamo

    torch._dynamo.list_backends()
    context = multiprocessing.get_context("fork")  # so that the child has imported torch already
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        sender.send(sharded() if kind == "sharded" else functions(kind) | modules(kind))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        found: dict[str, str] = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{kind}: the process ended with exit code {process.exitcode}") from None
    process.join()
    return found
