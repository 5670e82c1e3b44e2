"""The plot of the README: times as multiples of the copy, as one SVG file."""

from __future__ import annotations

from html import escape
from typing import Any

from compacter_kernels.bench.cost import DIRECTIONS
from compacter_kernels.bench.report_page.results import Sweep
from compacter_kernels.bench.report_page.svg import Linear, label, tag

TOKENS = 8192
SHOWN = {
    "dense": "dense: builds H",
    "factored": "factored",
    "factored-compiled": "factored, compiled",
    "cpu": "fused",
}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 860, 330, 44, 54, 34, 36
STYLE = """
svg { color: #1b1e23; font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; }
text { fill: currentColor; text-anchor: middle; } .start { text-anchor: start; } .end { text-anchor: end; }
.rule { stroke: currentColor; opacity: 0.15; } .copy { stroke: currentColor; stroke-dasharray: 2 4; stroke-width: 2; }
.small { font-size: 11px; } .title { font-weight: 600; } .p0 { fill: #b3261e; } .p1 { fill: #7f9a55; }
.p2 { fill: #1e7d32; } .p3 { fill: #0b57d0; }
@media (prefers-color-scheme: dark) {
  svg { color: #e6e8eb; } .p0 { fill: #ff8a80; } .p1 { fill: #a6c07a; } .p2 { fill: #6fd08c; } .p3 { fill: #7cb0ff; }
}
"""


def _panel(sweep: Sweep, direction: str, left: float, width: float, y: Linear) -> str:
    """The bars of all shapes in one direction."""
    room = width / len(sweep.shapes)
    thick = (room - 18) / len(SHOWN)
    parts = [label(direction, left + width / 2, TOP - 10, class_="title")]
    for index, shape in enumerate(sweep.shapes):
        start = left + index * room + 9
        for number, provider in enumerate(SHOWN):
            wanted: dict[str, Any] = {"tokens": TOKENS, "direction": direction, "provider": provider}
            (row,) = sweep.select(**shape._asdict(), **wanted)
            value, x = row["over_equal_copy"], start + number * thick
            box = {"x": x + 1, "y": y(value), "width": thick - 2, "height": y.start - y(value)}
            parts.append(tag("rect", class_=f"p{number}", **box))
            parts.append(label(f"{value:.1f}", x + thick / 2, y(value) - 4, class_="small"))
        parts.append(label(str(shape), start + 2 * thick, HEIGHT - 12))
    return "".join(parts)


def svg(sweep: Sweep, source: str) -> str:
    """The text of the file. source: the committed file that the numbers come from."""
    rows = [row for row in sweep.select(tokens=TOKENS) if row["provider"] in SHOWN]
    y = Linear(max(row["over_equal_copy"] for row in rows) * 1.08, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - LEFT - GAP - 8) / 2
    parts = [tag("path", class_="rule", d=f"M{LEFT} {y(v):.1f}H{WIDTH - 8}") for v in y.ticks()]
    parts += [label(f"{v:g}x", LEFT - 6, y(v) + 4, class_="end small") for v in y.ticks()]
    parts += [_panel(sweep, each, LEFT + i * (width + GAP), width, y) for i, each in enumerate(DIRECTIONS)]
    parts.append(tag("path", class_="copy", d=f"M{LEFT} {y(1.0):.1f}H{WIDTH - 8}"))
    x = float(LEFT)
    for number, text in enumerate(SHOWN.values()):
        parts += [
            tag("rect", class_=f"p{number}", x=x, y=12, width=12, height=12),
            label(text, x + 18, 23, class_="start"),
        ]
        x += 42 + 7.2 * len(text)
    parts.append(label("dotted: the copy, the limit", x + 4, 23, class_="start"))
    machine = sweep.table["machine"]
    about = f"Time over that of a copy, {TOKENS} tokens, float32, {machine['cpu']}, {machine['threads']} threads"
    namespace = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img"}
    head = [tag("title", escape(about)), tag("desc", escape(f"From {source}")), f"<style>{STYLE}</style>"]
    return tag("svg", *head, *(f"\n{part}" for part in parts), "\n", **namespace) + "\n"
