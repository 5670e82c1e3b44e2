"""The `Kernel` of adapters with dense projections, whose weights lie in memory in either order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compacter_kernels.calls import AdapterCall, BankCall, Call
from compacter_kernels.impl import Gradients
from compacter_kernels.impl.memory import Parameters, addresses
from compacter_kernels.impl.triton.kernel import TritonKernel
from compacter_kernels.impl.triton.mixing import MixedKernel
from compacter_kernels.impl.triton.routed import RoutedKernel
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights

SLOTS = (1, 3, 6, 7)  # of down.weight, down.bias, up.weight, up.bias among the parameters of two PHMWeights


def kernel_class(problem: Problem) -> type[TritonKernel]:
    """The class of the kernel for a single adapter, a routed bank or a mixed one."""
    if problem.bank is None:
        return TritonKernel
    return MixedKernel if problem.bank.mixed else RoutedKernel


class Slots(Parameters):
    """Parameters that DenseKernel has checked."""

    def readable(self, tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], tuple[int, ...]]:
        return tensors, addresses(tensors)


class DenseKernel:
    """It gives the weights to a kernel as the wide factors of n = 1.

    A weight whose transpose is contiguous, such as that of an nn.Linear, is read as it lies. One
    with other strides is copied.
    """

    differentiable = norms = False

    def __init__(self, problem: Problem) -> None:
        self.problem, self.parameters = problem, Parameters(problem)
        self.kernels: dict[tuple[bool, ...], TritonKernel] = {}

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        inner, _, kernel = self._inner(call)
        return kernel.forward(inner, out)

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        inner, turned, kernel = self._inner(call)
        of_slots = [False] * 8
        for slot, want in zip(SLOTS, wanted[1:5], strict=True):
            of_slots[slot] = want
        of_x, *grads = kernel.backward(inner, grad, (wanted[0], *of_slots, *wanted[5:]))
        down, of_bias1, up, of_bias2 = (grads[slot] for slot in SLOTS)
        down, up = (
            t.mT if transposed and t is not None else t for t, transposed in zip((down, up), turned, strict=True)
        )
        return (of_x, down, of_bias1, up, of_bias2, *grads[8:])

    def _inner(self, call: Call) -> tuple[Call, tuple[bool, ...], TritonKernel]:
        """The call with PHMWeights, which weights lie transposed, and the kernel for that."""
        assert isinstance(call, AdapterCall | BankCall)
        weights = call.down[0], call.up[0]
        turned = tuple([not w.is_contiguous() and w.mT.is_contiguous() for w in weights])
        lying = [w.mT if transposed else w for w, transposed in zip(weights, turned, strict=True)]
        (down, bias1, up, bias2), _ = self.parameters.readable((lying[0], call.down[1], lying[1], call.up[1]))
        kernel = self.kernels.get(turned)
        if kernel is None:
            kernel = self.kernels[turned] = kernel_class(self.problem)(self.problem, turned)
            kernel.parameters = Slots(self.problem)
        slots = PHMWeights(None, down, None, bias1), PHMWeights(None, None, up, bias2)  # type: ignore[arg-type]
        return call._replace(down=slots[0], up=slots[1]), turned, kernel
