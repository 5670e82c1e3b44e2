"""The time of one call on the host: the microseconds that Python takes before the device can start.

    python benchmarks/host_time.py OUT [--device cuda] [--rounds 60] [--seconds 60]

A call has one token, so that an impl of plain torch computes little. The launch of a Triton or CUDA
kernel is replaced by a call that does nothing. So the rest can be measured on a machine without a
GPU. On a GPU the time with the real launch is measured as well.

Writes OUT/host_time.csv and OUT/host_time.json: medians with 20 and 80 % quantiles over interleaved
rounds. `quiet` is false if the machine was slowed down in too many of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import compacter_kernels as ck
from compacter_kernels import call_path, machine
from compacter_kernels.cases import Case, Inputs, Shape
from compacter_kernels.impl import cuda, triton as package

SHAPE = Shape(768, 24, 4)
COLUMNS = ("operation", "impl", "launch", "what", "device", "dtype", "us", "us_20", "us_80", "quiet")
BACKWARD = "forward+backward"
GPU = ("triton", "cuda")
CALLS = 100  # in one sample
SLOWED = 1.2  # times the best yardstick: a round beside a slower one is dropped


class NoLaunch:
    """A plan of the CUDA kernels that launches no kernel."""

    def __init__(self, *_: object) -> None:
        pass

    def workspace(self, tokens: int) -> int:
        """The number of floats that a backward takes on an H100."""
        return 132 * (3 * SHAPE.k + 3 * SHAPE.d + 2 * SHAPE.n**3)

    def forward_workspace(self, tokens: int) -> int:
        """These shapes need none."""
        return 0

    def forward(self, *_: object) -> None:
        """Do nothing."""

    backward = forward


@contextmanager
def replaced_cuda_launch() -> Iterator[None]:
    """The CUDA kernels serve any device and do nothing.

    A Python class replaces their plan. It costs 0.2 us less.
    """
    on_gpu = torch.cuda.is_available()
    with (
        mock.patch.object(cuda, "unavailable", return_value=None),
        mock.patch.object(cuda, "refuses", return_value=None),
        mock.patch.object(cuda, "_C", SimpleNamespace(CudaLinear=NoLaunch, CudaAdapter=NoLaunch)),
        mock.patch.object(cuda, "_device", return_value=(132, 227 * 1024, 228 * 1024, 90)),
        mock.patch.object(cuda, "_current_device", cuda._current_device if on_gpu else int),  # int() is 0
        mock.patch.object(cuda, "_current_stream", cuda._current_stream if on_gpu else int),
        mock.patch.object(call_path, "_plans", {}),
    ):
        yield


@contextmanager
def replaced_launch() -> Iterator[None]:
    """The Triton kernels serve any device, are not compiled, and do nothing."""
    from compacter_kernels.impl.triton import launch

    on_gpu = torch.cuda.is_available()
    nothing = SimpleNamespace(
        run=lambda *_: None, function=0, packed_metadata=None, metadata=None, _init_handles=lambda: None
    )
    with (
        mock.patch.object(package, "unavailable", return_value=None),
        mock.patch.object(package, "refuses", return_value=None),
        mock.patch.object(launch.Launch, "compile", return_value=nothing),
        mock.patch.object(launch.Tiled, "fits", return_value=True),
        mock.patch.object(launch, "current_device", launch.current_device if on_gpu else int),  # int() is 0
        mock.patch.object(launch, "current_stream", launch.current_stream if on_gpu else int),
        mock.patch.object(call_path, "_plans", {}),  # so that no plan with a replaced launch is kept
    ):
        yield


def call_of(case: Inputs, impl: str) -> Callable[[], torch.Tensor]:
    """A call of the public function, with nothing around it but a lambda."""
    x, down, up = case.x, case.down, case.up
    if up is None:
        return lambda: ck.phm_linear(x, down, impl=impl)
    return lambda: ck.compacter_adapter(x, down, up, residual=x, impl=impl)


def calls(case: Inputs, impl: str) -> dict[str, Callable[[], Any]]:
    """The calls that are measured, by name."""
    leaves = case.map(lambda t: t.detach().clone().requires_grad_())
    plain, recording = call_of(case, impl), call_of(leaves, impl)
    wanted = list(leaves.tensors().values())
    return {
        "forward": plain,
        "forward with grad": recording,
        BACKWARD: lambda: torch.autograd.grad(recording(), wanted, leaves.grad),
    }


def sample(call: Callable[[], Any], count: int, synchronize: Callable[[], None]) -> float:
    """Microseconds of one call, as the mean of `count` calls. The device may still be computing."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    synchronize()
    return elapsed / count * 1e6


def yardstick() -> float:
    """Seconds that a fixed piece of Python takes."""
    start = time.perf_counter()
    for _ in range(5):
        sum(map(abs, range(2000)))
    return time.perf_counter() - start


def undisturbed(one_round: Callable[[], None], times: dict[Any, list[float]], rounds: int, seconds: float) -> bool:
    """Take rounds until enough of them were undisturbed, and drop those on a slowed machine.

    If the time runs out before, all rounds are kept and the result is False. Another program on the
    second thread of the same core slows a call to half its speed, and no counter of a virtual
    machine shows it.
    """
    one_round()  # warms up
    kept: dict[Any, list[float]] = {name: [] for name in times}
    dropped: dict[Any, list[float]] = {name: [] for name in times}
    start, best, count = time.perf_counter(), min(yardstick() for _ in range(20)), 0
    while count < rounds and time.perf_counter() - start < seconds:
        for taken in times.values():
            taken.clear()
        before = yardstick()
        one_round()
        around = (before, yardstick())
        if min(around) < 0.9 * best:  # the machine was slowed in all rounds before
            kept, count = {name: [] for name in times}, 0
        best = min(best, *around)
        slow = max(around) > SLOWED * best
        count += not slow
        for name, taken in times.items():
            (dropped if slow else kept)[name].extend(taken)
    for name, taken in times.items():
        taken[:] = kept[name] if count >= rounds else kept[name] + dropped[name]
    return count >= rounds


def measure(case: Inputs, impls: list[str], args: argparse.Namespace, launch: str) -> list[dict[str, Any]]:
    """A row for each impl and each of `calls`."""
    synchronize = torch.cuda.synchronize if case.x.is_cuda else lambda: None
    bound = {(impl, what): call for impl in impls for what, call in calls(case, impl).items()}
    found: dict[tuple[str, str], list[float]] = {name: [] for name in bound}

    def one_round() -> None:
        for (impl, what), call in bound.items():
            call()
            found[impl, what].append(sample(call, CALLS, synchronize))

    quiet = undisturbed(one_round, found, args.rounds, args.seconds)
    rows = []
    for (impl, what), times in found.items():
        low, *_, high = statistics.quantiles(times, n=5)
        operation = "phm_linear" if case.up is None else "compacter_adapter"
        how = launch if impl in GPU else "real"
        device, dtype = case.x.device.type, str(case.x.dtype).removeprefix("torch.")
        us = (round(t, 2) for t in (statistics.median(times), low, high))
        values = (operation, impl, how, what, device, dtype, *us, quiet)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=60, help="undisturbed ones")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each operation, to wait for a quiet machine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for operation in ("adapter", "linear"):
        case = Case.of(SHAPE, 1, operation=operation).inputs().map(lambda t: t.to(args.device))
        plain = [impl for impl in ("cpu", "factored") if impl == "factored" or args.device == "cpu"]
        plain = [impl for impl in plain if ck.available_impls()[impl] is None]
        replaced = ["cuda"] if find_spec("triton") is None else ["cuda", "triton"]
        with replaced_cuda_launch(), replaced_launch() if "triton" in replaced else nullcontext():
            rows += measure(case, [*replaced, *plain], args, "replaced")
        if args.device == "cuda":
            rows += measure(case, [impl for impl in GPU if ck.available_impls()[impl] is None], args, "real")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "host_time.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    report = {"machine": machine.describe(), "shape": SHAPE._asdict(), "tokens": 1, "rows": rows}
    (args.out / "host_time.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(*(f"{row[name]!s:<18}" for name in COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
