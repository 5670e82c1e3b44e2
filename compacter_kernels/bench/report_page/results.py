"""The results of one machine as a page needs them: sweeps, host times and first calls."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compacter_kernels.cases import Shape

Row = dict[str, Any]
FUSED = ("triton", "cuda", "cpu")  # the first of them in a table is "ours"


@dataclass
class Sweep:
    """One table of a bench.json. name: its folder, relative to that of the machine."""

    name: str
    settings: dict[str, Any]
    table: Row

    @property
    def title(self) -> str:
        """What distinguishes the sweeps of a machine."""
        parts = [self.settings["dtype"]]
        if "page_faults" in self.table:
            parts.append(f"{self.table['machine']['threads']} threads, page faults {self.table['page_faults']}")
        return ", ".join(parts) + (f" ({self.name})" if self.name else "")

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        rows: list[Row] = self.table["rows"]
        return rows

    @property
    def shapes(self) -> list[Shape]:
        """The shapes, in their order."""
        return list(dict.fromkeys(Shape(row["k"], row["d"], row["n"]) for row in self.rows))

    def select(self, **wanted: Any) -> list[Row]:
        """The rows that have these values."""
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    @property
    def ours(self) -> str | None:
        """The fused impl of this table."""
        names = {row["provider"] for row in self.rows}
        return next((name for name in FUSED if name in names), None)


@dataclass
class Results:
    """Everything that one folder holds. host and first: the JSON files of these names."""

    name: str
    sweeps: list[Sweep] = field(default_factory=list)
    host: Row | None = None
    first: Row | None = None

    @property
    def machine(self) -> Row:
        """The description of the machine and, on a GPU, of the device."""
        for sweep in self.sweeps:
            machine: Row = sweep.table["machine"] | sweep.table.get("device", {})
            return machine
        found: Row = (self.first or self.host or {}).get("machine", {})
        return found


def _of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load(folder: Path) -> Results:
    """Read a folder and its subfolders one level down.

    Raises:
        ValueError: the folder holds no result that a page shows.
    """
    results = Results(folder.resolve().name, host=_of(folder / "host_time.json"), first=_of(folder / "first_call.json"))
    for path in [folder / "bench.json", *sorted(folder.glob("*/bench.json"))]:
        report = _of(path)
        name = "" if path.parent == folder else path.parent.name
        for table in (report or {}).get("tables", ()):
            if table["rows"]:
                results.sweeps.append(Sweep(name, report["settings"], table))
    if not (results.sweeps or results.host or results.first):
        raise ValueError(f"{folder} has no bench.json, host_time.json or first_call.json; run compacter-kernels bench")
    return results
