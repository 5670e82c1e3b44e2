"""`compacter-kernels info`: the installation, the build, the impl that serves, a self-test."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from typing import Any

import torch

import compacter_kernels as ck
from compacter_kernels import machine
from compacter_kernels.accuracy import Oracle
from compacter_kernels.cases import Case, Shape, call

TYPICAL = Shape(768, 24, 4)
TYPICAL_TOKENS = 2048
SELF_TEST_TOKENS = 67
SELF_TEST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

EPILOG = """examples:
  compacter-kernels info
  compacter-kernels info --json
  COMPACTER_KERNELS_IMPL=factored compacter-kernels info

exits 0 when every available impl passes its self-test, forward and backward, and 1 when one does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `info`."""
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def self_test() -> list[dict[str, Any]]:
    """Compare forward and backward of each operation, impl, device and dtype with the oracle."""
    rows = []
    for device, dtype, operation in itertools.product(_devices(), SELF_TEST_DTYPES, ("adapter", "linear")):
        case = Case.of(TYPICAL, SELF_TEST_TOKENS, operation=operation, dtype=dtype).inputs()
        case = case.map(functools.partial(torch.Tensor.to, device=device))
        others = ck.explain(case.x, case.down, case.up, activation=case.activation, impl="dense").others
        oracle = Oracle(case)
        for impl in ck.available_impls():
            if not others.get(impl, "can serve").startswith("can serve"):
                continue
            row = {"impl": impl, "device": device, "operation": operation, "dtype": str(dtype).removeprefix("torch.")}
            try:
                worst = max(oracle.check(call(impl), impl=impl), key=lambda each: each.error / each.limit)
                rows.append({**row, "holds": worst.holds, "worst": str(worst)})
            except RuntimeError as error:
                rows.append({**row, "holds": False, "worst": str(error)})
    return rows


def collect() -> dict[str, Any]:
    """Everything that `info` prints, in JSON types."""
    device = _devices()[-1]
    case = Case.of(TYPICAL, TYPICAL_TOKENS).inputs().map(lambda t: t.to(device))
    choice = ck.explain(case.x, case.down, case.up, residual=case.x)
    return {
        **machine.describe(),
        "impls": ck.available_impls(),
        "typical_call": {
            "call": f"compacter_adapter {TYPICAL}, T={TYPICAL_TOKENS}, float32, {device}",
            "impl": choice.impl,
            "reason": choice.reason,
            "others": choice.others,
        },
        "self_test": self_test(),
    }


def _text(report: dict[str, Any]) -> str:
    native, typical = report["native"], report["typical_call"]
    if native["built"]:
        isas = ", ".join(native.get("isa", ()))
        built = f"{native.get('compiler')}, kernels for {isas}; this processor runs {native['isa_in_use']}"
        if not native.get("openmp"):
            built += ", on one thread (no OpenMP)"
    else:
        built = native["reason"]
    cuda = ", ".join(native.get("cuda_archs", ())) or f"not built: {native.get('cuda_missing', 'no native part')}"
    lines = [
        f"compacter_kernels  {report['compacter_kernels']}, revision {report['revision'] or 'unknown'}",
        f"python             {report['python']}, torch {report['torch']} ({report['torch_cpu_capability']})",
        f"machine            {report['cpu']}, {report['cores']} cores, {report['memory_gib']} GiB, {report['system']}",
        f"threads            {report['threads']}, torch.get_num_threads()",
        f"native part        {built}",
        f"CUDA part          {cuda}",
        "",
        "impls",
        *(f"  {name:<10} {'available' if reason is None else reason}" for name, reason in report["impls"].items()),
        "",
        f"{typical['call']}: {typical['impl']}, {typical['reason']}",
        *(f"  not {name:<10} {reason}" for name, reason in typical["others"].items()),
        "",
        f"self-test, forward and backward, {TYPICAL}, T={SELF_TEST_TOKENS}, the worst of all tensors",
    ]
    pattern = "  {verdict} {impl:<10} {device:<5} {operation:<8} {dtype:<9} {worst}"
    for row in report["self_test"]:
        lines.append(pattern.format(verdict="ok  " if row["holds"] else "FAIL", **row))
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print the report and return 0 if every self-test passes, else 1."""
    report = collect()
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0 if all(row["holds"] for row in report["self_test"]) else 1
