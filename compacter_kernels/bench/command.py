"""`compacter-kernels bench`: read the options, measure, write the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from compacter_kernels import options
from compacter_kernels.bench import page_faults, plots, report
from compacter_kernels.bench.providers import missing, providers
from compacter_kernels.bench.settings import PAGE_FAULTS, QUICK, Settings

EPILOG = """examples:
  compacter-kernels bench --quick
  compacter-kernels bench --shapes 768/24/4 --tokens 2048,8192 --dtype bf16 --impl dense,cpu
  compacter-kernels bench --threads 1 --page-faults removed --out results

providers: copy (always), dense (H in each call), dense-cached (H once; forward only), factored, factored-compiled
(torch.compile), and each fused impl that this machine runs. Each is timed only after its output and gradients were
found within the limits of `compare` on that shape (on fewer tokens where x has more than 2^25 numbers).

writes bench.json, bench.csv, bench.txt and a picture for each table into the folder --out.

exits 0 when every provider that ran passed its check, and 1 when one did not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--quick", action="store_true", help="one shape, three token counts, one table: about a minute")
    add("--shapes", type=options.shapes, metavar="k/d/n,...", help=f"default {_list(Settings.shapes)}")
    add("--tokens", type=options.tokens, metavar="T,...", help=f"default {_list(Settings.tokens)}")
    add("--dtype", type=options.dtype, help=f"of x, of {', '.join(options.DTYPES)}; default {Settings.dtype}")
    add("--impl", type=options.names, metavar="NAMES", help="the providers to time; default all")
    add("--threads", type=options.positive, help="of torch; default torch's own number")
    add("--rounds", type=options.positive, help="samples of each row; default as many as fit into --seconds")
    add("--seconds", type=float, help=f"for each shape and token count, default {Settings.seconds:g}")
    add("--page-faults", choices=(*PAGE_FAULTS, "both"), help="which tables; default both")
    add("--out", type=Path, default=Path("out/bench"), help="folder for the results, default out/bench")
    add("--no-plot", action="store_true", help="no pictures, which need matplotlib")
    add("--json", action="store_true", help="print the JSON report instead of the tables")


def _list(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


def _settings(args: argparse.Namespace) -> Settings:
    given = {
        "shapes": args.shapes and tuple(args.shapes),
        "tokens": args.tokens and tuple(args.tokens),
        "dtype": args.dtype,
        "providers": args.impl and tuple(args.impl),
        "threads": args.threads,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "page_faults": {None: None, "both": PAGE_FAULTS}.get(args.page_faults, (args.page_faults,)),
    }
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(QUICK if args.quick else Settings(), **given)


def _check_providers(names: list[str] | None) -> None:
    known, absent = providers(), missing()
    for name in names or ():
        if name in absent:
            raise ValueError(f"--impl {name} cannot run here: {absent[name]}")
        if name not in known:
            raise ValueError(f"--impl {name} is not known; choose of {', '.join(known)}")


def run(args: argparse.Namespace) -> int:
    """Measure and report; 0 when every provider that ran passed the correctness gate."""
    _check_providers(args.impl)
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds must be a number > 0, got {args.seconds:g}")
    if not args.no_plot:
        plots.require()
    settings = _settings(args)
    args.out.mkdir(parents=True, exist_ok=True)
    tables = [page_faults.measure(settings, kind) for kind in settings.page_faults]
    found = {"settings": json.loads(settings.to_json()), "tables": tables}
    paths = report.write(found, args.out)
    if not args.no_plot:
        for table in tables:
            kind, dtype = table["page_faults"], settings.dtype
            title = f"{dtype}, {table['machine']['threads']} threads, page faults {kind}"
            paths.append(plots.write(table, title, args.out / f"bench_faults_{kind}.png"))
    print(json.dumps(found, indent=1) if args.json else report.text(found))
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    return 1 if any(absent["wrong"] for table in tables for absent in table["absent"]) else 0
