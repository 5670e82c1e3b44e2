"""The page of one machine."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from compacter_kernels.bench.report_page import sections
from compacter_kernels.bench.report_page.html import document, section, table
from compacter_kernels.bench.report_page.results import Results, Sweep, load
from compacter_kernels.bench.report_page.svg import tag

HEADING = re.compile(r'<section id="(\w+)"><h2>(.*?)</h2>')
FACTS = ("gpu", "cpu", "cores", "memory_gib", "system", "python", "torch", "cuda", "driver", "triton")


def facts(results: Results) -> str:
    """Return what was measured on, and when, as one paragraph."""
    machine = results.machine
    known = [f"{key.replace('_', ' ')} {machine[key]}" for key in FACTS if machine.get(key) is not None]
    isa = machine.get("native", {}).get("isa_in_use")
    known += [f"instruction set {isa}"] if isa else []
    known += [f"compacter_kernels {machine.get('revision') or machine.get('compacter_kernels')}", machine["time"][:10]]
    return tag("p", escape("; ".join(known)), class_="facts")


def _charts(sweep: Sweep, number: int) -> list[str]:
    """Return the sections of a sweep. With page faults, all providers pay for them: times alone."""
    parts = [sections.time_over_tokens(sweep, f"time{number}")]
    if sweep.table.get("page_faults") == "kept":
        return parts
    parts.append(sections.speed_ups(sweep, f"peers{number}"))
    parts.append(sections.rooflines(sweep, f"roofline{number}"))
    parts += [sections.memory(sweep, f"memory{number}"), sections.one_token(sweep, f"one{number}")]
    return parts


def _providers(results: Results) -> str:
    """Return what the peers are, and what is absent."""
    described = {name: peer for sweep in results.sweeps for name, peer in sweep.table.get("peers", {}).items()}
    rows = [(name, peer["method"], peer["what"], peer["package"]) for name, peer in described.items()]
    absent = dict.fromkeys(
        (row["provider"], row["reason"]) for sweep in results.sweeps for row in sweep.table["absent"]
    )
    text = (
        "copy is a clone of x and, with a backward, dx = x + gradient. dense builds H in each call, dense-cached once. "
        "factored is plain torch that never builds H."
    )
    parts = [table(("peer", "method", "what it is", "package"), rows)] if rows else []
    if absent:
        parts.append(tag("h3", "Absent"))
        parts.append(table(("provider", "reason"), absent))
    return section("providers", "Providers", text, tag("div", *parts, class_="scroll left"))


def html(results: Results) -> str:
    """Return the whole page."""
    content = [part for number, sweep in enumerate(results.sweeps) for part in _charts(sweep, number)]
    content += [sections.host_time(results.host)] if results.host else []
    content += [sections.first_call(results.first)] if results.first else []
    content.append(_providers(results))
    content = [part for part in content if part]
    groups: dict[str, list[str]] = {}
    for identifier, title in HEADING.findall("".join(content)):
        what, _, sweep = title.partition(": ")
        groups.setdefault(sweep or "this machine", []).append(tag("a", what, href=f"#{identifier}"))
    links = [tag("p", f"{name}: ", " ".join(found)) for name, found in groups.items()]
    title = f"Compacter kernels on {results.name}"
    how = (
        "Every chart holds what was measured: point at a mark, or reach a chart with Tab and its marks with the arrow "
        "keys, to read its numbers. The table below each chart has the same numbers."
    )
    head = [tag("h1", escape(title)), facts(results), tag("p", how), tag("nav", *links, aria_label="Sections")]
    return document(title, "\n".join(head), "\n<main>\n", *content, "</main>\n")


def write(folder: Path, target: Path | None = None) -> Path:
    """Write report.html from the results of a folder into it, or into `target`; return the path.

    Raises:
        ValueError: the folder holds no results.
    """
    path = (target or folder) / "report.html"
    text = html(load(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
