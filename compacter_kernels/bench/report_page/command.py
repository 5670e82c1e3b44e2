"""`compacter-kernels report`: the page of results that were measured before."""

from __future__ import annotations

import argparse
from pathlib import Path

from compacter_kernels.bench.report_page import page

EPILOG = """examples:
  compacter-kernels report out/bench
  compacter-kernels report benchmarks/results/epyc-2core --out out

reads bench.json, host_time.json and first_call.json of the folder, and bench.json of its subfolders. writes
report.html, one file that a browser shows without any network."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `report`."""
    parser.epilog = EPILOG
    parser.add_argument("folder", type=Path, help="the results of one machine")
    parser.add_argument("--out", type=Path, help="where report.html is written, default the folder itself")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder} is not a folder; give the --out of compacter-kernels bench")
    print(page.write(args.folder, args.out))
    return 0
