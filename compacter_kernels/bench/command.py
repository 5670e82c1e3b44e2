"""`compacter-kernels bench`: read the options, measure, write the report."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from compacter_kernels import options
from compacter_kernels.bench import cpu, cuda, first_call, peers, plots, report
from compacter_kernels.bench.first_programs import PROGRAMS
from compacter_kernels.bench.providers import missing, providers
from compacter_kernels.bench.report_page import page
from compacter_kernels.bench.settings import CPU, CUDA, DEFAULTS, PAGE_FAULTS, Settings

EPILOG = """examples:
  compacter-kernels bench --quick
  compacter-kernels bench --shapes 768/24/4 --tokens 2048,8192 --dtype bf16 --impl dense,cpu
  compacter-kernels bench --threads 1 --page-faults removed --out results
  compacter-kernels bench --peers --threads 1 --page-faults removed
  compacter-kernels bench --first-call --threads 1
  compacter-kernels bench --out results --report results
  compacter-kernels bench --device cuda --limit 300

providers: copy (always), dense (H in each call), dense-cached (H once; forward only), factored, factored-compiled
(torch.compile), and each fused impl that this machine runs; with --device cuda also dense-compiled, and with a 16-bit x
the same in x's own dtype (-lowp), which is beyond the contract's error and marked so. Each is timed only after its
output and gradients were found within the limits of `compare` on that shape (on fewer tokens where x has more than 2^25
numbers).

--peers adds modules of other packages, and of this one, each with weights of its own: Compacter of adapters, the plain
bottleneck adapter, LoRA and LoKr of peft, LoKr of lycoris, as shipped, compiled and patched. What is not installed is
named in the report.

--first-call measures the time from the start of a new process to the end of its first forward and backward, for
CompacterAdapter and for the peers, with empty caches of torch.compile, in --rounds processes each. It writes
first_call.json and first_call.txt.

writes bench.json, bench.csv, bench.txt and a picture for each table into the folder --out; with --device cuda the first
three after each shape. --report writes a page of all results in --out; `compacter-kernels report` writes it later.

exits 0 when every provider that ran passed its check, and 1 when one did not."""

UNUSED = {"cpu": ("compiled_shapes", "limit"), "cuda": ("threads", "page_faults", "first_call")}  # on that device
UNUSED_IN_FIRST_CALL = ("quick", "shapes", "tokens", "dtype", "peers", "seconds", "page_faults")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu; the defaults below are the cpu's")
    add("--quick", action="store_true", help="one shape, three token counts, one table: about a minute")
    add("--shapes", type=options.shapes, metavar="k/d/n,...", help=f"default {','.join(map(str, CPU.shapes))}")
    add("--tokens", type=options.tokens, metavar="T,...", help=f"default {','.join(map(str, CPU.tokens))}")
    add("--dtype", type=options.dtype, help=f"of x, of {', '.join(options.DTYPES)}; default {CPU.dtype}")
    add("--impl", type=options.names, dest="providers", metavar="NAMES", help="the providers to time; default all")
    add("--peers", action="store_true", default=None, help="time modules of other packages too, and ours")
    add("--first-call", action="store_true", help="instead of the sweep: the first call of new processes (cpu)")
    add("--threads", type=options.positive, help="of torch; default torch's own number (cpu)")
    add("--rounds", type=options.positive, help="samples of each row; default as many as fit into --seconds")
    add("--seconds", type=float, help=f"for each shape and token count, default {CPU.seconds:g}")
    add("--page-faults", choices=(*PAGE_FAULTS, "both"), help="which tables; default both (cpu)")
    add("--compiled-shapes", type=options.shapes, metavar="k/d/n,...", help="where torch.compile is timed too (cuda)")
    add("--limit", type=float, help=f"seconds for the whole sweep, default {CUDA.limit:g} (cuda)")
    add("--out", type=Path, default=Path("out/bench"), help="folder for the results, default out/bench")
    add("--report", type=Path, metavar="FOLDER", help="also write the results as one HTML page, FOLDER/report.html")
    add("--no-plot", action="store_true", help="no pictures, which need matplotlib")
    add("--json", action="store_true", help="print the JSON report instead of the tables")


def _settings(args: argparse.Namespace) -> Settings:
    """Return the defaults of the device, with the options that were given."""
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    if args.page_faults is not None:
        given["page_faults"] = PAGE_FAULTS if args.page_faults == "both" else (args.page_faults,)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    defaults = DEFAULTS[args.device, args.quick]
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _check(args: argparse.Namespace, settings: Settings) -> None:
    """Raise for options that are wrong or have no effect beside the others, before any work."""
    unused = [(name, f"--device {args.device}") for name in UNUSED[args.device]]
    unused += [(name, "--first-call") for name in UNUSED_IN_FIRST_CALL if args.first_call]
    for name, beside in unused:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {beside}")
    for name in ("seconds", "limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be a number > 0, got {value:g}")
    if args.device == "cuda":
        cuda.require()
    if not (args.no_plot or args.first_call):
        plots.require()
    dtype = options.DTYPES[settings.dtype]
    known, absent = list(providers(args.device, dtype)), missing(args.device)
    if args.first_call:
        known, absent = list(PROGRAMS), {}
    elif settings.peers:
        known, absent = [*known, *peers.providers(dtype)], absent | peers.missing(args.device)
    for name in args.providers or ():
        if name in absent:
            raise ValueError(f"--impl {name} cannot run here: {absent[name]}")
        if name not in known:
            raise ValueError(f"--impl {name} is not known; choose of {', '.join(known)}")


def _report(args: argparse.Namespace) -> list[Path]:
    """Write the page of all results in --out if --report asks for it, and return its path."""
    return [] if args.report is None else [page.write(args.out, args.report)]


def _first_call(args: argparse.Namespace) -> int:
    """Measure the first calls; 1 when ours failed, else 0."""
    threads, starts = args.threads or torch.get_num_threads(), args.rounds or first_call.STARTS
    result = first_call.measure(threads, starts, args.providers)
    paths = first_call.write(result, args.out) + _report(args)
    print(json.dumps(result, indent=1) if args.json else first_call.text(result))
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    return 1 if any(absent["wrong"] for absent in result["absent"]) else 0


def run(args: argparse.Namespace) -> int:
    """Measure and report; 0 when every provider that ran passed the correctness gate."""
    settings = _settings(args)
    _check(args, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.first_call:
        return _first_call(args)
    results: dict[str, Any] = {"settings": json.loads(settings.to_json())}
    paths: list[Path] = []
    for tables in (cpu if args.device == "cpu" else cuda).tables(settings):
        results["tables"] = tables
        paths = report.write(results, args.out)
    if not args.no_plot:
        paths += plots.write(results, args.out)
    paths += _report(args)
    print(json.dumps(results, indent=1) if args.json else report.text(results))
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    return 1 if any(absent["wrong"] for table in results["tables"] for absent in table["absent"]) else 0
