"""Writes the tables of docs/options.md from the dataclasses and the signatures.

    python docs/option_tables.py [--check]

With --check it writes nothing, and exits with 1 if a table differs.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import compacter_kernels as ck
from compacter_kernels.config import BottleneckConfig

PAGE = Path(__file__).parent / "options.md"
CONFIGS = (ck.CompacterConfig, BottleneckConfig)
MODULES = (ck.PHMLinear, ck.CompacterAdapter, ck.BottleneckAdapter)


def _cell(value: Any) -> str:
    """A default as Python writes it; "" where there is no such option."""
    return "" if value is inspect.Parameter.empty else f"`{value!r}`".replace("'", '"')


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return lines[0] + "|---" * len(head) + "|\n" + "".join(lines[1:])


def configs() -> str:
    """Each option of the configs: its default in each, and what it means."""
    fields = [{field.name: field for field in dataclasses.fields(config)} for config in CONFIGS]
    rows = []
    for name in dict.fromkeys(name for options in fields for name in options):
        own = [options.get(name) for options in fields]
        defaults = [inspect.Parameter.empty if field is None else field.default for field in own]
        meaning = next(field.metadata["help"] for field in own if field is not None)
        rows.append((f"`{name}`", *map(_cell, defaults), meaning.partition("; the default of")[0]))
    return _table(("option", "Compacter", "bottleneck", "what it is"), rows)


def modules() -> str:
    """Each option of the modules, with its default in each."""
    signatures = [inspect.signature(module).parameters for module in MODULES]
    options = [{name: o.default for name, o in s.items() if o.default is not o.empty} for s in signatures]
    names = dict.fromkeys(name for of_module in reversed(options) for name in of_module)
    rows = [(f"`{name}`", *(_cell(own.get(name, inspect.Parameter.empty)) for own in options)) for name in names]
    return _table(("option", *(f"`{module.__name__}`" for module in MODULES)), rows)


def main() -> int:
    """Write the tables, or with --check compare them."""
    text = new = PAGE.read_text(encoding="utf-8")
    for name, table in (("configs", configs), ("modules", modules)):
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        before, rest = new.split(begin)
        new = f"{before}{begin}{table()}{end}{rest.split(end)[1]}"
    if "--check" in sys.argv[1:]:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
