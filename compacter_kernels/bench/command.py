"""`compacter-kernels bench`: read the options, measure, write the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from compacter_kernels import options
from compacter_kernels.bench import page_faults, plots, report
from compacter_kernels.bench.cuda import command as cuda, device, report as cuda_report
from compacter_kernels.bench.cuda.sweep import all_providers
from compacter_kernels.bench.providers import Provider, missing, providers
from compacter_kernels.bench.settings import CUDA, CUDA_QUICK, PAGE_FAULTS, QUICK, Settings

EPILOG = """examples:
  compacter-kernels bench --quick
  compacter-kernels bench --shapes 768/24/4 --tokens 2048,8192 --dtype bf16 --impl dense,cpu
  compacter-kernels bench --threads 1 --page-faults removed --out results
  compacter-kernels bench --device cuda --limit 300

providers: copy (always), dense (H in each call), dense-cached (H once; forward only), factored, factored-compiled
(torch.compile), and each fused impl that this machine runs; with --device cuda also dense-compiled, and with a 16-bit x
the same in x's own dtype (-lowp), which is beyond the contract's error and marked so. Each is timed only after its
output and gradients were found within the limits of `compare` on that shape (on fewer tokens where x has more than 2^25
numbers).

writes bench.json, bench.csv, bench.txt and a picture for each table into the folder --out; with --device cuda the first
three after each shape.

exits 0 when every provider that ran passed its check, and 1 when one did not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu; the defaults below are the cpu's")
    add("--quick", action="store_true", help="one shape, three token counts, one table: about a minute")
    add("--shapes", type=options.shapes, metavar="k/d/n,...", help=f"default {_list(Settings.shapes)}")
    add("--tokens", type=options.tokens, metavar="T,...", help=f"default {_list(Settings.tokens)}")
    add("--dtype", type=options.dtype, help=f"of x, of {', '.join(options.DTYPES)}; default {Settings.dtype}")
    add("--impl", type=options.names, metavar="NAMES", help="the providers to time; default all")
    add("--threads", type=options.positive, help="of torch; default torch's own number (cpu)")
    add("--rounds", type=options.positive, help="samples of each row; default as many as fit into --seconds")
    add("--seconds", type=float, help=f"for each shape and token count, default {Settings.seconds:g}")
    add("--page-faults", choices=(*PAGE_FAULTS, "both"), help="which tables; default both (cpu)")
    add("--compiled-shapes", type=options.shapes, metavar="k/d/n,...", help="where torch.compile is timed too (cuda)")
    add("--limit", type=float, help=f"seconds for the whole sweep, default {CUDA.limit:g} (cuda)")
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
        "compiled_shapes": args.compiled_shapes and tuple(args.compiled_shapes),
        "limit": args.limit,
    }
    given = {name: value for name, value in given.items() if value is not None}
    presets = {("cpu", False): Settings(), ("cpu", True): QUICK, ("cuda", False): CUDA, ("cuda", True): CUDA_QUICK}
    return dataclasses.replace(presets[args.device, args.quick], **given)


def _check_providers(names: list[str] | None, known: dict[str, Provider], absent: dict[str, str]) -> None:
    for name in names or ():
        if name in absent:
            raise ValueError(f"--impl {name} cannot run here: {absent[name]}")
        if name not in known:
            raise ValueError(f"--impl {name} is not known; choose of {', '.join(known)}")


def _check(args: argparse.Namespace) -> None:
    """Raise for options that are wrong or of the other device, before any work."""
    other = {"cpu": ("compiled_shapes", "limit"), "cuda": ("threads", "page_faults")}[args.device]
    for name in other:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with --device {args.device}")
    for name in ("seconds", "limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be a number > 0, got {value:g}")
    if args.device == "cuda":
        device.require()
    if not args.no_plot:
        plots.require()


def _measure_cpu(settings: Settings, args: argparse.Namespace) -> tuple[dict[str, Any], list[Path], str]:
    tables = [page_faults.measure(settings, kind) for kind in settings.page_faults]
    found = {"settings": json.loads(settings.to_json()), "tables": tables}
    paths = report.write(found, args.out)
    if not args.no_plot:
        for table in tables:
            kind, dtype = table["page_faults"], settings.dtype
            title = f"{dtype}, {table['machine']['threads']} threads, page faults {kind}"
            paths.append(plots.write(table, title, args.out / f"bench_faults_{kind}.png"))
    return found, paths, report.text(found)


def _measure_cuda(settings: Settings, args: argparse.Namespace) -> tuple[dict[str, Any], list[Path], str]:
    found = cuda.run(settings, args.out)
    paths = cuda_report.write(found, args.out)
    (table,) = found["tables"]
    if table["rows"] and not args.no_plot:
        title = f"{settings.dtype}, {table['device']['gpu']}, cold"
        paths.append(plots.write(table, title, args.out / "bench.png"))
    return found, paths, cuda_report.text(found)


def run(args: argparse.Namespace) -> int:
    """Measure and report; 0 when every provider that ran passed the correctness gate."""
    _check(args)
    settings = _settings(args)
    known = providers() if args.device == "cpu" else all_providers(options.DTYPES[settings.dtype])
    _check_providers(args.impl, known, missing(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    found, paths, text = (_measure_cpu if args.device == "cpu" else _measure_cuda)(settings, args)
    print(json.dumps(found, indent=1) if args.json else text)
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    return 1 if any(absent["wrong"] for table in found["tables"] for absent in table["absent"]) else 0
