"""Runs a command line of gpu_run.sh up to the point where its work would begin.

    python benchmarks/gpu_dry.py -m pytest ...        collects the tests
    python benchmarks/gpu_dry.py setup.py ...         reads the options
    python benchmarks/gpu_dry.py -m MODULE ...        reads the arguments
    python benchmarks/gpu_dry.py SCRIPT ...           reads the arguments

Everything that the script imports is imported, and its own parser reads the arguments. So a wrong
name or option shows without a GPU.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from typing import Any, NoReturn

_parse = argparse.ArgumentParser.parse_args


def _parse_alone(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
    """Read the arguments, print what was read, and end the process."""
    print(f"{sys.argv[0]}: {vars(_parse(parser, *args, **options))}")
    sys.exit(0)


def main() -> None:
    """Run the rest of the command line as Python would, but for its work."""
    first, *rest = sys.argv[1:]
    if (first, rest[:1]) == ("-m", ["pytest"]):
        sys.argv = ["pytest", *rest[1:], "--collect-only", "-q"]
        runpy.run_module("pytest", run_name="__main__")
    if first == "setup.py":
        sys.argv = [first, *rest, "--help"]
        runpy.run_path(first, run_name="__main__")
        return
    argparse.ArgumentParser.parse_args = _parse_alone  # type: ignore[method-assign]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
    sys.exit(f"{sys.argv[0]} read no arguments, and has done its work")


if __name__ == "__main__":
    main()
