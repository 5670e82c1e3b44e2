"""`Launch`, called as the package calls it, for a device that this machine lacks.

A fake driver reports such a device to Triton.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = '''
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    """What Triton asks of its driver until a kernel is compiled."""

    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)


driver.set_active(Driver())

from compacter_kernels.cases import Case, Shape
from compacter_kernels.impl.triton import launch
from compacter_kernels.impl.triton.kernel import KERNELS, REDUCE_WARPS, TritonKernel, reduction
from compacter_kernels.impl.triton.plan import Options, plan, served
from compacter_kernels.impl.triton.reduce import reduce_rows
from compacter_kernels.problem import adapter_problem, linear_problem

case = Case.of(Shape(64, 16, 4), 16, dtype=torch.bfloat16).inputs()
problem = adapter_problem(case.x, case.down, case.up, case.activation)
kernels = served(problem, "sm_90")
out, options = torch.empty_like(case.x), Options(SAME=True, RESIDUAL=True, HAS_BIAS=True)
s = kernels["backward"].sizes
part, params = torch.empty(4, s.OFFSETS.ROW), (*case.down, *case.up)
for name, tensors in (
    ("forward", (case.x, case.x, out, *params)),
    ("backward", (case.x, case.grad, out, part, *params[:7])),
):
    sizes, precision, (config, *_) = kernels[name]
    tiled = launch.Tiled(KERNELS[name], plan(sizes, config, precision, options), config, 0, 4)
    found = tiled.compile(tensors)
    assert launch.fits(found.metadata, 227 * 1024), name
    assert found.metadata.shared > 0 and found.metadata.num_warps == config.warps, name
    assert found.asm["cubin"] and "mma" in found.asm["ptx"], name
    assert tiled.tail == (tiled.constants["P"],), name
rule1, left1, right1, bias1, rule2, left2, right2, bias2 = params
grads = (left1, right2, bias2, rule1, right1, None, rule2, left2)
found = launch.Launch(reduce_rows, reduction(s), REDUCE_WARPS, 0).compile((part, *grads))
assert found.metadata.num_warps == REDUCE_WARPS
case = Case("linear", 36, 24, 12, rank=3).inputs()  # the most columns of a factor
sizes, precision, (config, *_) = served(linear_problem(case.x, case.down), "sm_90")["forward_streamed"]
rule, left, right, bias = case.down
tiled = launch.Tiled(KERNELS["forward_streamed"], plan(sizes, config, precision, Options()), config, 0, 4)
assert launch.fits(tiled.compile((case.x, None, case.grad, rule, left, *[None] * 4, right, bias)).metadata, 227 * 1024)
print("compiled")

ran, patterns = [], []


class Compiled:
    run = staticmethod(lambda *arguments: ran.append(arguments))
    function = packed_metadata = None
    _init_handles = lambda self: patterns.append(addresses)


launch.current_device, launch.current_stream = lambda: 0, lambda device: 7
one = launch.Launch(KERNELS[name], tiled.constants, config.warps, 0)
one.compile = lambda tensors: Compiled()
for addresses in ((16, 0, 32), (32, 0, 48), (16, 16, 32), (24, 0, 32), (32, 0, 16)):
    one(3, 1, [out if address else None for address in addresses], addresses, 0.5, 9)
assert patterns == [(16, 0, 32), (16, 16, 32), (24, 0, 32)]  # as it is absent, aligned, or x is unaligned
assert ran[1] == (3, 1, 1, 7, None, None, None, None, None, 32, 0, 48, 0.5, 9, *tiled.tail)
try:
    one(3, 1, (out, out, out), (16, 0, 32), 0.5, 9)
except ValueError as error:
    assert "no memory" in str(error)
assert len(ran) == 5
print("launched")

launch.Tiled.fits = lambda self, tensors: tensors[1] is None or self.config.stages < 3
kernel = TritonKernel(problem)
assert kernel._launch("forward", (case.x, None, out, *params), False).config.stages == 3
assert kernel._launch("forward", (case.x, case.grad, out, *params), False).config.stages == 2
large = torch.empty(2**31, dtype=torch.uint8, device="meta")
assert launch.pattern((out, large), (16, 32)) == (0, 0)
torch.version.hip = "7.0"
assert launch.pattern((out, large, None), (16, 36, 0)) == (0, 4, None, False, True, False)
print("chosen")
'''


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_and_launch_for_a_device_that_is_not_there() -> None:
    """A launch compiles once for each pattern of absent tensors and of addresses.

    A kernel chooses a configuration for each.

    It runs in a process of its own, since the driver is a global variable of Triton.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "compiled\nlaunched\nchosen\n"), done.stderr
