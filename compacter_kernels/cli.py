"""The command `compacter-kernels`.

Each subcommand is a module with `add_arguments(parser)` and `run(args) -> int`. The exit code is 0
if all checks pass, 1 if one fails, and 2 if the command cannot be carried out as given.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from compacter_kernels import __version__

PROGRAM = "compacter-kernels"
COMMANDS = {
    "info": ("compacter_kernels.info", "what is installed and built, which impl serves, and a self-test"),
    "compare": ("compacter_kernels.compare", "the error of each impl against the float64 dense reference"),
    "bench": ("compacter_kernels.bench.command", "time every impl against what else a user could run"),
    "report": ("compacter_kernels.bench.report_page.command", "one HTML page of what bench measured"),
    "convert": (
        "compacter_kernels.checkpoints.command",
        "checkpoints of other Compacter libraries, into any other form",
    ),
    "train": (
        "compacter_kernels.train",
        "adapt a transformers model to your data; by itself, a demonstration on handwritten digits",
    ),
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser with the arguments of the chosen subcommand; no other module is imported."""
    parser = _Parser(prog=PROGRAM, description="Fused kernels for Compacter adapters.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    return parser


def _message(command: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = {"sklearn": "scikit-learn"}.get(error.name.partition(".")[0], error.name.partition(".")[0])
        return f"{command} needs the package {package}, which is not installed: pip install {package}"
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Wrong arguments raise SystemExit(2)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen: Any = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        args = _parser(chosen).parse_args(arguments)
        code: int = importlib.import_module(COMMANDS[chosen][0]).run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"{PROGRAM} {chosen}: error: {_message(chosen, error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {chosen}: interrupted", file=sys.stderr)
        return 130
    return code
