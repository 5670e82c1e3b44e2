"""Horizontal bars: one row for each provider, one bar or one stack for each of its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from compacter_kernels.bench.report_page.look import look
from compacter_kernels.bench.report_page.svg import Linear, Log, chart, label, mark, tag

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440, 132, 58, 6, 24


class Bar(NamedTuple):
    """A value with what it says and what stands at its end. kind: a CSS class, such as second."""

    value: float
    words: str
    end: str
    kind: str = ""


def _axis(scale: Log | Linear, ticks: Sequence[tuple[float, str]], height: float) -> str:
    parts = []
    for value, text in ticks:
        parts.append(tag("path", d=f"M{scale(value):.1f} {TOP}V{height - BOTTOM:.1f}"))
        parts.append(label(text, scale(value), height - 8, class_="middle"))
    return tag("g", *parts, class_="axes")


def _chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[Bar]]],
    scale: Log | Linear,
    origin: float,
    unit: str,
    thick: float,
    stacked: bool,
) -> str:
    y, parts = float(TOP), []
    for name, bars in rows:
        drawn, left, room = [], origin, thick * (1 if stacked else len(bars))
        drawn.append(label(name, LEFT - 6, y + room / 2 + 4, class_="end"))
        for bar in bars:
            at = scale(bar.value) if not stacked else left + scale(bar.value) - origin
            start, stop = sorted((left, at))
            box = {"x": start, "y": y + 1, "width": max(stop - start, 1.0), "height": thick - 2}
            drawn.append(mark("rect", bar.words, class_=bar.kind or None, **box))
            if not stacked or bar is bars[-1]:
                drawn.append(label(bar.end, max(stop, origin) + 4, y + thick / 2 + 4))
            left, y = (at, y) if stacked else (origin, y + thick)
        y += thick + 4 if stacked else 5
        parts.append(tag("g", *drawn, class_=f"bars {look(name)}"))
    height = y + BOTTOM
    ticks = [(value, f"{value:g}{unit}") for value in scale.ticks()]
    return chart(title, WIDTH, height, _axis(scale, ticks, height), *parts)


def ratios(title: str, rows: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Return bars of ratios on a logarithmic scale: to the right of 1, and to the left below 1."""
    values = [bar.value for _, bars in rows for bar in bars]
    scale = Log(min(0.8, min(values) / 1.1), max(2.0, max(values) * 1.05), LEFT, WIDTH - RIGHT)
    return _chart(title, rows, scale, scale(1.0), "x", 12, stacked=False)


def amounts(title: str, rows: Sequence[tuple[str, Sequence[Bar]]], unit: str = "", stacked: bool = False) -> str:
    """Return bars that start at 0, beside one another or stacked."""
    totals = [sum(bar.value for bar in bars) if stacked else max(bar.value for bar in bars) for _, bars in rows]
    scale = Linear(max(*totals, 1e-9) * 1.02, LEFT, WIDTH - RIGHT)
    return _chart(title, rows, scale, LEFT, unit, 16 if stacked else 13, stacked)
