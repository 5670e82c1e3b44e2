"""Time over tokens, one chart for each shape and direction. The copy is drawn as the limit."""

from __future__ import annotations

from compacter_kernels.bench.report import duration
from compacter_kernels.bench.report_page.look import look
from compacter_kernels.bench.report_page.results import Row, Sweep
from compacter_kernels.bench.report_page.svg import Log, around, chart, count, label, mark, spread, tag
from compacter_kernels.cases import Shape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440, 52, 128, 12, 34
LINE = 12.5  # between two labels


def words(row: Row) -> str:
    """Return what a mark says: the time with its quantiles, and the multiple of the copy."""
    low, high = duration(row["ms_q20"]), duration(row["ms_q80"])
    text = f"{row['provider']}, {row['tokens']} tokens: {duration(row['ms'])} (20 % {low}, 80 % {high})"
    if row["over_equal_copy"] and row["provider"] != "copy":
        text += f", {row['over_equal_copy']:.2f} times the copy"
    return text + ("" if row.get("quiet", True) else ", beside other load")


def _series(name: str, rows: list[Row], x: Log, y: Log, text_y: float) -> str:
    points = [(x(row["tokens"]), y(row["ms"])) for row in rows]
    parts = [tag("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in points))]
    for (a, b), row in zip(points, rows, strict=True):
        parts.append(tag("path", class_="range", d=f"M{a:.1f} {y(row['ms_q20']):.1f}V{y(row['ms_q80']):.1f}"))
        parts.append(mark("circle", words(row), cx=a, cy=b, r=3.2))
    end, edge = points[-1], x.end + 8
    parts.append(tag("path", class_="leader", d=f"M{end[0] + 4:.1f} {end[1]:.1f}L{edge:.1f} {text_y:.1f}"))
    parts.append(label(name, edge + 3, text_y + 4))
    return tag("g", *parts, class_=f"series {look(name)}")


def _axes(x: Log, y: Log, tokens: list[int], height: float) -> str:
    parts = []
    for value in y.ticks():
        parts.append(tag("path", d=f"M{x.start:.1f} {y(value):.1f}H{x.end:.1f}"))
        parts.append(label(duration(value).replace(".00", "").replace(".0", ""), x.start - 5, y(value) + 4))
    for value in tokens:
        parts.append(label(count(value), x(value), height - BOTTOM + 16, class_="middle"))
    parts.append(label("tokens", (x.start + x.end) / 2, height - 3, class_="middle"))
    return tag("g", *parts, class_="axes")


def panel(sweep: Sweep, shape: Shape, direction: str) -> str:
    """Return the chart of one shape and direction, "" without rows."""
    rows = sweep.select(**shape._asdict(), direction=direction)
    by_provider: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        by_provider.setdefault(row["provider"], []).append(row)
    if not by_provider:
        return ""
    height = max(300.0, LINE * len(by_provider) + TOP + BOTTOM)
    tokens = sorted({row["tokens"] for row in rows})
    x = Log(tokens[0], max(tokens[-1], tokens[0] * 2), LEFT + 6, WIDTH - RIGHT)
    times = [row[key] for row in rows for key in ("ms_q20", "ms_q80")]
    y = Log(*around(times), height - BOTTOM, TOP)
    ends = [y(series[-1]["ms"]) for series in by_provider.values()]
    places = spread(ends, LINE, TOP, height - BOTTOM)
    drawn = [_series(name, series, x, y, at) for (name, series), at in zip(by_provider.items(), places, strict=True)]
    title = f"{shape}, {direction}: time over tokens"
    return chart(title, WIDTH, height, _axes(x, y, tokens, height), *drawn)
