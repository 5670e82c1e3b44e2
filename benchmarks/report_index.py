"""The dashboard: one page across the machines and revisions of benchmarks/results.

A cell is a shape, a token count and a direction. What is compared is the time of the fused impl as
a multiple of that of the copy and of dense in the same rounds, because two machines of one name
need not be equally fast. Its range is from the 20 % quantile of the time over the 80 % quantile of
the other to the 80 % quantile over the 20 % quantile. A revision is slower than the one before
where its range lies above the other by more than MARGIN for the copy and for dense. No revision
changes these two, and a change of the machine rarely moves both.
"""

from __future__ import annotations

import itertools
import json
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from compacter_kernels.bench.cost import DIRECTIONS
from compacter_kernels.bench.report_page.html import document, figure, grid, section, table
from compacter_kernels.bench.report_page.results import Sweep
from compacter_kernels.bench.report_page.svg import Log, around, chart, label, mark, spread, tag

MARGIN = 1.05
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 230, 44, 80, 14, 30
HEADLINE = {"k": 768, "d": 24, "n": 4, "tokens": 8192}
COLORS = ("ours", "dense", "factored", "adapters", "lora", "lokr")  # of shapes, in this chart

Cell = tuple[Any, ...]  # k, d, n, tokens, direction


class Multiple(NamedTuple):
    """A time as a multiple of another, with its range."""

    middle: float
    low: float
    high: float

    def slower(self, before: Multiple) -> bool:
        """Whether the whole range lies above the other by more than the margin."""
        return self.low > before.high * MARGIN

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} to {self.high:.2f})"


class Revision(NamedTuple):
    """A sweep of one revision on one machine."""

    sweep: Sweep

    @property
    def name(self) -> str:
        return self.sweep.table["machine"]["revision"][:7]

    @property
    def time(self) -> str:
        return self.sweep.table["machine"]["time"]

    def multiples(self, of: str = "copy") -> dict[Cell, Multiple]:
        """Our times as multiples of another provider. Rows beside other load are left out."""
        others = {_cell(row): row for row in self.sweep.select(provider=of)}
        found = {}
        for row in self.sweep.select(provider=self.sweep.ours):
            other = others.get(_cell(row))
            if other is not None and row.get("quiet", True) and other.get("quiet", True):
                times = (row["ms"] / other["ms"], row["ms_q20"] / other["ms_q80"], row["ms_q80"] / other["ms_q20"])
                found[_cell(row)] = Multiple(*times)
        return found


def _cell(row: dict[str, Any]) -> Cell:
    return (row["k"], row["d"], row["n"], row["tokens"], row["direction"])


def revisions(folder: Path) -> list[Revision]:
    """The float32 sweeps of a machine without page faults, the oldest first."""
    found = []
    for path in [folder / "bench.json", *folder.glob("revisions/*.json")]:
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            tables = [t for t in report["tables"] if t["rows"] and t.get("page_faults") != "kept"]
            found += [Revision(Sweep("", report["settings"], t)) for t in tables[:1]]
    return sorted(found, key=lambda revision: revision.time)


def regressions(found: list[Revision]) -> list[tuple[Revision, Cell, Multiple, Multiple]]:
    """The cells in which a revision is slower than the one before, with multiples of the copy."""
    slower = []
    for before, after in itertools.pairwise(found):
        both = [(before.multiples(of), after.multiples(of)) for of in ("copy", "dense")]
        for cell in both[0][1]:
            if all(cell in old and cell in new and new[cell].slower(old[cell]) for old, new in both):
                slower.append((after, cell, both[0][0][cell], both[0][1][cell]))
    return slower


def _chart(found: list[Revision], tokens: int, direction: str) -> str:
    """The multiples of all shapes over the revisions."""
    series: dict[Cell, list[tuple[int, Multiple]]] = {}
    for index, revision in enumerate(found):
        for cell, multiple in revision.multiples().items():
            if cell[3:] == (tokens, direction):
                series.setdefault(cell, []).append((index, multiple))
    if not series:
        return ""
    marked = {(revision.name, cell) for revision, cell, _, _ in regressions(found)}
    edges = [edge for points in series.values() for _, multiple in points for edge in multiple[1:]]
    y = Log(*around([*edges, 1.0]), HEIGHT - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT - 12) / max(1, len(found) - 1)
    axes = [tag("path", d=f"M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}") for v in y.ticks()]
    axes += [label(f"{v:g}x", LEFT - 5, y(v) + 4) for v in y.ticks()]
    axes += [label(r.name, LEFT + 6 + step * i, HEIGHT - 10, class_="middle") for i, r in enumerate(found)]
    places = spread([y(points[-1][1].middle) for points in series.values()], 13, TOP, HEIGHT - BOTTOM)
    drawn = []
    for (cell, points), color, place in zip(series.items(), COLORS, places, strict=False):
        shape = "/".join(map(str, cell[:3]))
        at = [(LEFT + 6 + step * index, y(multiple.middle)) for index, multiple in points]
        parts = [tag("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in at))]
        for (a, b), (index, multiple) in zip(at, points, strict=True):
            slow = (found[index].name, cell) in marked
            words = f"{shape}, {found[index].name}: {multiple} times the copy"
            words += ", slower than before" if slow else ""
            parts.append(tag("path", class_="range", d=f"M{a:.1f} {y(multiple.low):.1f}V{y(multiple.high):.1f}"))
            parts += [tag("circle", class_="ring", cx=a, cy=b, r=8.0)] if slow else []
            parts.append(mark("circle", words, cx=a, cy=b, r=3.5))
        parts.append(label(shape, WIDTH - RIGHT + 8, place + 4))
        drawn.append(tag("g", *parts, class_=f"series {color}"))
    return chart(f"{tokens} tokens, {direction}", WIDTH, HEIGHT, tag("g", *axes, class_="axes"), *drawn)


def _history(name: str, found: list[Revision]) -> str:
    """The section of a machine that was measured at several revisions."""
    slower, figures = regressions(found), []
    for tokens in sorted({cell[3] for cell in found[-1].multiples()}):
        for direction in DIRECTIONS:
            rows = []
            for revision in found:
                multiples = revision.multiples()
                here = {cell: each for cell, each in multiples.items() if cell[3:] == (tokens, direction)}
                rows += [(revision.name, "/".join(map(str, cell[:3])), str(each)) for cell, each in here.items()]
            numbers = table(("revision", "shape", "times the copy"), rows)
            figures.append(figure(f"{tokens:,} tokens, {direction}", _chart(found, tokens, direction), numbers))
    listed = [
        (revision.name, "/".join(map(str, cell[:3])), f"{cell[3]:,}", cell[4], str(before), str(after))
        for revision, cell, before, after in slower
    ]
    cells = len(found[-1].multiples())
    last = [row for row in slower if row[0].name == found[-1].name]
    text = (
        f"{len(found)} revisions of {cells} cells (shape, tokens, direction). Slower than in the revision before: "
        f"{len(last)} in the last one, {len(slower)} over all revisions."
    )
    head = ("revision", "shape", "tokens", "direction", "before", "after")
    marked = tag("div", table(head, listed), class_="scroll") if listed else ""
    return section(name.replace("-", ""), f"{name}: over the revisions", text, marked, grid(figures))


def _overview(machines: list[Path]) -> str:
    """One row for each machine with a page."""
    rows = []
    for folder in machines:
        found = revisions(folder)
        cells = [tag("a", escape(folder.name), href=f"{folder.name}/report.html")]
        if not found:
            rows.append([*cells, "", "", "", "", "", ""])
            continue
        last = found[-1]
        machine = last.sweep.table["machine"] | last.sweep.table.get("device", {})
        multiples = last.multiples()
        values = [multiples.get((*HEADLINE.values(), direction)) for direction in DIRECTIONS]
        slower = [row for row in regressions(found) if row[0].name == last.name]
        state = tag("span", f"{len(slower)} slower", class_="slower") if slower else "none slower"
        about = [machine.get("gpu") or machine["cpu"], str(machine["threads"]), last.name, machine["time"][:10]]
        multiples_text = [f"{value.middle:.2f}" if value else "-" for value in values]
        rows.append([*cells, *about, *multiples_text, state if len(found) > 1 else "one revision"])
    head = ("machine", "processor", "threads", "revision", "date", "forward / copy", "both / copy", "last revision")
    return tag("div", table(head, rows), class_="scroll")


def html(root: Path) -> str:
    """The page of all machines below `root` that have a report."""
    machines = sorted(path.parent for path in root.glob("*/report.html"))
    histories = [(folder.name, revisions(folder)) for folder in machines]
    title = "Compacter kernels: machines and revisions"
    rule = (
        "Compared is the time of the fused kernel as a multiple of the copy, and of dense, in the same rounds. Its "
        "range is from its 20 % quantile over the 80 % quantile of the other to its 80 % quantile over the 20 % "
        "quantile of the other. A revision is marked as slower than the one before where its range lies above the "
        f"other by more than {100 * (MARGIN - 1):.0f} %, both for the copy and for dense. No revision changes these "
        "two. The table shows the shape 768/24/4 with 8,192 tokens in float32, page faults removed."
    )
    head = [tag("h1", title), tag("p", rule), _overview(machines)]
    return document(
        title, *head, "\n<main>\n", *(_history(*each) for each in histories if len(each[1]) > 1), "</main>\n"
    )
