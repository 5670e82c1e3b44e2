"""Fused CUDA kernels (csrc/cuda). Forward reads x once; backward reads x and the gradient once."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compacter_kernels.impl import Kernel, bank_of_one, native, not_fused
from compacter_kernels.impl.memory import addresses
from compacter_kernels.impl.module import BUILD as _BUILD, MISSING, MODULE as _C
from compacter_kernels.impl.native_family import FamilyKernel
from compacter_kernels.private import (
    current_device as _current_device,
    current_stream as _current_stream,
    evaluated_when_compiled,
)
from compacter_kernels.problem import Bank, Problem, Projection

OPERANDS_LIKE_X = True  # the matrix operands that meet a 16-bit x are pairs of bfloat16 numbers
PHM_DIMS = (1, 2, 4, 8, 12, 16)
RANKS = (1, 2, 4)
OLDEST = 80  # the least compute capability, 10 * major + minor

# The versions of CUDA that the driver serves and that is linked in, 1000 major + 10 minor.
_versions = functools.cache(lambda module: module.cuda_versions())

# Tests replace this, _C, _BUILD and the functions of the device, so that the CPU executes kernels.
_DEVICE_TYPE = "cuda"


class Device(NamedTuple):
    """A device as csrc/cuda needs it (launch.h); shared memory in bytes, of a block and in all."""

    multiprocessors: int
    shared_limit: int
    shared_per_multiprocessor: int
    capability: int


def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    # From the CUDA C++ programming guide, as torch < 2.7 does not say it. A block gets 1 KiB less.
    kib = 228 if capability // 10 in (9, 10, 11) else 164 if capability in (80, 87) else 100
    return Device(properties.multi_processor_count, (kib - 1) * 1024, kib * 1024, capability)


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if _C is None:
        return MISSING
    if not _BUILD["cuda"]:
        return f"not built: {_BUILD['cuda_missing']}"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no CUDA device"
    return _old_driver(needs_ptx=False)


def refuses(problem: Problem) -> str | None:
    """Why the kernels cannot serve this problem, or None."""
    if problem.device.type != _DEVICE_TYPE:
        return f"x is on {problem.device.type}, not on {_DEVICE_TYPE}"
    if bank_of_one.serves(problem):
        problem = bank_of_one.single(problem)
    reason = not_fused(problem) or _not_compiled(problem)
    if reason is None and unavailable() is None:
        reason = _refused(problem.operation, native.plan_arguments(problem), problem.bank, problem.device.index or 0)
    return reason


def _not_compiled(problem: Problem) -> str | None:
    """Why no kernel was compiled for these sizes, or None. Some sizes only csrc/cuda can judge."""
    if problem.operation != "adapter":
        return None
    projections: tuple[Projection, ...] = problem.projections
    for p in projections:
        if p.phm_dim is None:
            return f"a rule of shape ({p.terms}, {p.n_in}, {p.n_out}) is compiled for single projections alone"
        if p.phm_dim not in PHM_DIMS or p.rank not in RANKS:
            served = f"phm_dim {', '.join(map(str, PHM_DIMS))} and phm_rank {', '.join(map(str, RANKS))}"
            return f"phm_dim={p.phm_dim} with phm_rank={p.rank} is not compiled; {served} are"
    if len({(p.phm_dim, p.rank) for p in projections}) > 1:
        return "down and up differ in phm_dim or phm_rank"
    return None


def _compiled() -> list[int]:
    """The architectures that the kernels were compiled for; none if the CPU executes them."""
    return [int(name.removeprefix("sm_")) for name in _BUILD["cuda_archs"]]


def _other_architecture(capability: int) -> str | None:
    """Why the compiled code cannot run on a device, or None. Machine code fits one generation."""
    if capability < OLDEST:
        return f"the device is sm_{capability}; sm_{OLDEST} or later is needed"
    compiled = _compiled()
    if not compiled or any(a // 10 == capability // 10 and a <= capability for a in compiled):
        return None
    if capability > max(compiled):  # runs the PTX of the last architecture
        return _old_driver(needs_ptx=True)
    return f"compiled for {', '.join(f'sm_{a}' for a in compiled)}; the device is sm_{capability}"


@evaluated_when_compiled
def _old_driver(needs_ptx: bool) -> str | None:
    """Why the driver cannot run the kernels, or None.

    Machine code needs a driver for the same major version of CUDA, or a later one. PTX needs one
    that is as new as the compiler.
    """
    driver, built = _versions(_C)
    if driver >= built or (driver // 1000 == built // 1000 and not needs_ptx):
        return None
    served, used = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, built))
    return (
        f"the driver serves CUDA {served}, but the kernels were built with CUDA {used}; update the driver, "
        f"or install compacter-kernels again with nvcc {served} or older"
    )


def _as_compiled(device: Device) -> Device:
    """The device with the capability that the code on it was compiled for.

    A later device runs the PTX of an earlier architecture, which lacks what later ones have.
    """
    runs = max((a for a in _compiled() if a <= device.capability), default=device.capability)
    return device._replace(capability=runs)


def _plan(operation: str, arguments: tuple[Any, ...], device: Device) -> Any:
    return (_C.CudaLinear if operation == "linear" else _C.CudaAdapter)(*arguments, *_as_compiled(device))


def _bank_plan(arguments: tuple[Any, ...], bank: Bank, device: Device) -> Any:
    return _C.CudaBank(*arguments, bank.adapters, *bank.shared_rules, *_as_compiled(device))


@evaluated_when_compiled
def _refused(operation: str, arguments: tuple[Any, ...], bank: Bank | None, index: int) -> str | None:
    """Why the device or the native module cannot serve a problem, or None."""
    device = _device(index)
    if reason := _other_architecture(device.capability):
        return reason
    if bank is None:
        return _plan(operation, arguments, device).refuses() or None
    return _bank_plan(arguments, bank, device).refuses(bank.mixed) or None


def prepare(problem: Problem) -> Kernel:
    """The kernel for this problem. Banks of Compacter adapters have kernels of their own."""
    if bank_of_one.serves(problem):
        return bank_of_one.BankOfOne(prepare(bank_of_one.single(problem)))
    if problem.bank is None and problem.operation != "bottleneck":
        return _Kernel(problem)
    return FamilyKernel(problem, functools.partial(_Kernel if problem.bank is None else _BankKernel, problem))


class _Kernel(native.Kernel):
    """A kernel that runs on the current stream of the tensors' device, without waiting for it."""

    def __init__(self, problem: Problem, transposed: tuple[bool, ...] = (False, False)) -> None:
        self.device, self.index = problem.device, problem.device.index or 0
        super().__init__(problem, self._make(problem, native.plan_arguments(problem, transposed)))
        # A forward that needs no memory for one row needs none for any number of them.
        self.needs_memory = problem.bank is not None or self.plan.forward_workspace(1) > 0

    def _make(self, problem: Problem, arguments: tuple[Any, ...]) -> Any:
        return _plan(problem.operation, arguments, _device(self.index))

    def launch_forward(self, call: tuple[Any, ...], params: tuple[int, ...]) -> None:
        if self.index != _current_device():
            with torch.cuda.device(self.index):
                self.launch_forward(call, params)
            return
        workspace = self._empty(self._forward_workspace(call)) if self.needs_memory else None
        self.plan.forward(*call, *addresses((workspace,)), _current_stream(self.index), params)

    def launch_backward(self, call: tuple[Any, ...], tokens: int, params: tuple[int, ...]) -> None:
        if self.index != _current_device():
            with torch.cuda.device(self.index):
                self.launch_backward(call, tokens, params)
            return
        # The allocator gets it back on return, and gives it only to later work of the same stream.
        workspace = self._empty(self._workspace(call, tokens, params))
        self.plan.backward(*call, workspace.data_ptr(), _current_stream(self.index), params)

    def _empty(self, floats: int) -> Tensor:
        return torch.empty(floats, dtype=torch.float32, device=self.device)

    def _forward_workspace(self, call: tuple[Any, ...]) -> int:
        *_, tokens, _ = call
        floats: int = self.plan.forward_workspace(tokens)
        return floats

    def _workspace(self, call: tuple[Any, ...], tokens: int, params: tuple[int, ...]) -> int:
        floats: int = self.plan.workspace(tokens)
        return floats


class _BankKernel(_Kernel):
    """The same for a bank."""

    def _make(self, problem: Problem, arguments: tuple[Any, ...]) -> Any:
        assert problem.bank is not None
        return _bank_plan(arguments, problem.bank, _device(self.index))

    def _forward_workspace(self, call: tuple[Any, ...]) -> int:
        *_, tokens, _, choice = call
        floats: int = self.plan.forward_workspace(tokens, choice)
        return floats

    def _workspace(self, call: tuple[Any, ...], tokens: int, params: tuple[int, ...]) -> int:
        *_, choice, grad_mix = call
        floats: int = self.plan.workspace(tokens, choice, any(params[len(params) // 2 :]), grad_mix != 0)
        return floats
