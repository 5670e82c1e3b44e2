"""`compacter-kernels compare`: the error of every impl against dense in float64, by tensor."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

import compacter_kernels as ck
from compacter_kernels import options
from compacter_kernels.accuracy import Deviation, Oracle
from compacter_kernels.activations import FUSED, resolve
from compacter_kernels.cases import INITS, RESIDUALS, Case, Inputs, call
from compacter_kernels.dispatch import IMPLS

SHAPES = "768/24/4,768/48/12,1024/64/8"
OPERATIONS = ("adapter", "linear")

EPILOG = """examples:
  compacter-kernels compare
  compacter-kernels compare --impl cpu --shapes 4096/128/8 --tokens 1,1000 --dtype bf16
  compacter-kernels compare --activation relu --residual none --rank 2 --json

the error of a tensor is its largest difference from the reference as a part of the reference's largest number. The
limit is twice the error of dense in the same dtype, or a rounding floor of the dtype, whichever is larger.

exits 0 when every error is within its limit, and 1 when one is not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `compare`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--impl", type=options.names, metavar="NAMES", help=f"of {', '.join(IMPLS)}; by default all that can serve")
    add("--shapes", type=options.shapes, default=SHAPES, metavar="k/d/n,...", help=f"default {SHAPES}")
    add("--tokens", type=options.tokens, default="1,257", metavar="T,...", help="default 1,257")
    add("--dtype", type=options.dtype, default="float32", help=f"of x, of {', '.join(options.DTYPES)}; default float32")
    add("--rank", type=options.positive, default=1, help="phm_rank, default 1")
    add("--activation", default="gelu_new", help=f"one of {', '.join(FUSED)}; default gelu_new")
    add("--residual", choices=RESIDUALS, default="x", help="what the adapter adds: x itself (default), another tensor")
    add("--init", choices=INITS, default="random", help="weights of order 1 (default), or the authors' start")
    add("--operation", choices=(*OPERATIONS, "both"), default="both", help="default both")
    add("--seed", type=int, default=0, help="of the random numbers, default 0")
    add("--json", action="store_true", help="print one JSON object instead of tables")


def _errors(inputs: Inputs, impls: list[str] | None) -> tuple[dict[str, list[Deviation]], dict[str, str]]:
    """Return the errors by impl, and why others cannot serve; ValueError for one in `impls`."""
    errors, skipped, oracle = {}, {}, Oracle(inputs)
    for impl in impls or IMPLS:
        try:
            ck.explain(inputs.x, inputs.down, inputs.up, activation=inputs.activation, impl=impl)
        except RuntimeError as error:
            if impls:
                raise ValueError(str(error)) from error
            skipped[impl] = str(error)
        else:
            errors[impl] = oracle.check(call(impl), impl=impl)
    return errors, skipped


def _table(title: dict[str, Any], errors: dict[str, list[Deviation]], skipped: dict[str, str]) -> str:
    plain = ("operation", "shape", "dtype")
    head = (f"{value}" if key in plain else f"{key} {value}" for key, value in title.items())
    lines = [", ".join(head), f"  {'tensor':<12}{'limit':>9}" + "".join(f"{impl:>12}" for impl in errors)]
    for row in zip(*errors.values(), strict=True):
        cells = "".join(f"{d.error:>11.1e}{' ' if d.holds else '!'}" for d in row)
        lines.append(f"  {row[0].tensor:<12}{row[0].limit:>9.1e}{cells}")
    lines += [f"  without {impl}: {reason}" for impl, reason in skipped.items()]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Print errors and limits; return 0 when every error is within its limit."""
    unknown = [name for name in args.impl or () if name not in IMPLS]
    if unknown:
        raise ValueError(f"--impl {unknown[0]} is not known; choose of {', '.join(IMPLS)}")
    activation = resolve(args.activation).name
    operations = OPERATIONS if args.operation == "both" else (args.operation,)
    given = {name: getattr(args, name) for name in ("rank", "residual", "init", "seed")}
    given["dtype"] = options.DTYPES[args.dtype]
    cases, violations = [], 0
    for shape, tokens, operation in itertools.product(args.shapes, args.tokens, operations):
        title = {"operation": operation, "shape": str(shape), "dtype": args.dtype, "T": tokens, "rank": args.rank}
        if operation == "adapter":
            title |= {"activation": activation, "residual": args.residual}
        title["init"] = args.init
        case = Case.of(shape, tokens, operation=operation, activation=activation, **given)
        errors, skipped = _errors(case.inputs(), args.impl)
        results = {impl: [{**d._asdict(), "holds": d.holds} for d in row] for impl, row in errors.items()}
        violations += sum(not deviation["holds"] for row in results.values() for deviation in row)
        cases.append({**title, "impls": results, "skipped": skipped})
        if not args.json:
            print(_table(title, errors, skipped), end="\n\n")
    if args.json:
        print(json.dumps({"holds": violations == 0, "cases": cases}, indent=2))
    elif violations:
        print(f"{violations} errors above their limits, marked !", file=sys.stderr)
    else:
        print("every error is within its limit")
    return 1 if violations else 0
