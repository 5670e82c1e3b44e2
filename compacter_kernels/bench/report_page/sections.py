"""The sections of the page of a machine: each chart with the numbers that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from compacter_kernels.bench import report
from compacter_kernels.bench.cost import BOTH, DIRECTIONS, FORWARD
from compacter_kernels.bench.first_call import PHASES
from compacter_kernels.bench.report_page import bars, lines, roofline
from compacter_kernels.bench.report_page.bars import Bar
from compacter_kernels.bench.report_page.html import choice, figure, grid, section, table
from compacter_kernels.bench.report_page.look import look
from compacter_kernels.bench.report_page.results import Row, Sweep
from compacter_kernels.cases import Shape

TYPICAL = 8192  # tokens that are shown first, or the nearest count below
Bars = Sequence[tuple[str, Sequence[Bar]]]


def _times(rows: Sequence[Row]) -> str:
    head = ("provider", "tokens", "time", "20 %", "80 %", "times the copy")
    cells = []
    for row in rows:
        times = [report.duration(row[key]) for key in ("ms", "ms_q20", "ms_q80")]
        copy = f"{row['over_equal_copy']:.2f}" if row["over_equal_copy"] else "-"
        cells.append((row["provider"], f"{row['tokens']:,}", *times, copy))
    return table(head, cells)


def _values(rows: Bars, head: Sequence[str]) -> str:
    cells = [(name, *(bar.words.split(": ", 1)[-1] for bar in found)) for name, found in rows]
    return table(("provider", *head), cells)


def time_over_tokens(sweep: Sweep, identifier: str) -> str:
    """The time of each provider over tokens, for all shapes and both directions."""
    figures = []
    for shape, direction in product(sweep.shapes, DIRECTIONS):
        rows = sweep.select(**shape._asdict(), direction=direction)
        figures.append(figure(f"{shape}, {direction}", lines.panel(sweep, shape, direction), _times(rows)))
    text = (
        "Lower is faster, and the dotted line is the limit: a copy that moves as many bytes as the fused kernel. "
        "Shapes are hidden width / bottleneck width / phm_dim. Marks are medians; the lines through them reach from "
        "the 20 % to the 80 % quantile."
    )
    disturbed = sum(not row.get("quiet", True) for row in sweep.rows)
    if disturbed:
        text += f" <b>Other load disturbed {disturbed} of {len(sweep.rows)} rows: do not believe their times.</b>"
    return section(identifier, f"Time over tokens: {sweep.title}", text, grid(figures))


def _speed_up(sweep: Sweep, shape: Shape, tokens: int) -> Bars:
    """The time of each provider over ours, in both directions; the largest last."""
    cell = sweep.select(**shape._asdict(), tokens=tokens)
    mine = {row["direction"]: row for row in cell if row["provider"] == sweep.ours}
    found: dict[str, list[Bar]] = {}
    for row in cell:
        if row["provider"] in ("copy", sweep.ours) or row["direction"] not in mine:
            continue
        own = mine[row["direction"]]
        ratio, low = row["ms"] / own["ms"], row["ms_q20"] / own["ms_q80"]
        words = f"{row['provider']}, {row['direction']}: {ratio:.2f} times our time "
        words += f"({low:.2f} to {row['ms_q80'] / own['ms_q20']:.2f} between the 20 % and 80 % quantiles)"
        kind = "second" if row["direction"] == FORWARD else ""
        found.setdefault(row["provider"], []).append(Bar(ratio, words, f"{ratio:.1f}", kind))
    return sorted(found.items(), key=lambda item: item[1][-1].value)


def speed_ups(sweep: Sweep, identifier: str) -> str:
    """How many times as long as ours each provider takes, for each shape and token count."""
    tokens = sorted({row["tokens"] for row in sweep.rows})
    figures = []
    for count, shape in product(tokens, sweep.shapes):
        rows = _speed_up(sweep, shape, count)
        if rows:
            title = f"{shape}, {count:,} tokens: time over that of {sweep.ours}"
            numbers = _values(rows, ("forward", BOTH))
            figures.append(figure(title, bars.ratios(title, rows), numbers, identifier, count))
    if not figures:
        return ""
    text = (
        f"How many times as long as the fused kernel (<b class='ours'>{sweep.ours}</b>) each provider takes: the upper "
        "bar in the forward, the lower bar in forward and backward. Left of 1, the provider is faster."
    )
    chosen = max([count for count in tokens if count <= TYPICAL] or tokens[:1])
    return section(
        identifier, f"Against every peer: {sweep.title}", text, choice(identifier, tokens, chosen), grid(figures)
    )


def rooflines(sweep: Sweep, identifier: str) -> str:
    """Our rates and those of the same function in torch, below the roofs of the machine."""
    figures = []
    shown = [name for name in (sweep.ours, *roofline.SHOWN) if name and sweep.select(provider=name)]
    for direction in DIRECTIONS:
        svg = roofline.panel(sweep, direction)
        if svg:
            rows = [row for row in sweep.select(direction=direction) if row["provider"] in shown]
            figures.append(figure(direction, svg, _times(rows)))
    if not figures:
        return ""
    names = ", ".join(f"<b class='{look(name)}'>{name}</b>" for name in shown)
    text = (
        f"Shown are {names}. Operations and bytes are those of the fused kernel for all of them. So the marks of a "
        "shape stand above one another, and a higher one took less time. Larger marks have more tokens. With few "
        "tokens the time is that of Python. A mark above the slanted roof found its data in a cache. A mark above the "
        "flat roof computes faster than a 1024 x 1024 matrix product of torch."
    )
    return section(identifier, f"Roofline: {sweep.title}", text, grid(figures))


def memory(sweep: Sweep, identifier: str) -> str:
    """The bytes that a call keeps for its backward and, on a GPU, takes at most."""
    tokens = max((row["tokens"] for row in sweep.rows if row["tokens"] <= TYPICAL), default=1)
    figures = []
    for key, what in (("saved_bytes", "kept for the backward"), ("peak_bytes", "taken at once")):
        for shape in sweep.shapes:
            cell = sweep.select(**shape._asdict(), tokens=tokens, direction=BOTH)
            sizes = {row["provider"]: row.get(key) for row in cell}
            sized = {name: size for name, size in sizes.items() if size is not None}
            rows = []
            for name, size in sorted(sized.items(), key=lambda item: item[1]):
                text = f"{size / 2**20:.1f} MiB" if size >= 2**17 else f"{size:,} bytes"
                rows.append((name, [Bar(size / 2**20, f"{name}: {size:,} bytes {what}", text)]))
            if rows:
                title = f"{shape}, {tokens:,} tokens: {what}"
                figures.append(figure(title, bars.amounts(title, rows, " MiB"), _values(rows, (what,))))
    if not figures:
        return ""
    text = "What one adapter keeps from the forward for the backward, beyond x and the parameters."
    return section(identifier, f"Memory: {sweep.title}", text, grid(figures))


def one_token(sweep: Sweep, identifier: str) -> str:
    """The time of a call with one token, which is nearly all the time of Python."""
    figures = []
    for shape in sweep.shapes:
        found: dict[str, list[Bar]] = {}
        for row in sweep.select(**shape._asdict(), tokens=1):
            us = row.get("host_us") or row["ms"] * 1e3
            kind = "second" if row["direction"] == FORWARD else ""
            bar = Bar(us, lines.words(row), f"{us:.0f} us", kind)
            found.setdefault(row["provider"], []).append(bar)
        rows = sorted(found.items(), key=lambda item: item[1][-1].value)
        if rows:
            title = f"{shape}, one token"
            figures.append(figure(title, bars.amounts(title, rows, " us"), _values(rows, ("forward", BOTH))))
    if not figures:
        return ""
    text = "With one token a call is nearly all Python. Upper bar: forward. Lower bar: forward and backward."
    return section(identifier, f"Host time: {sweep.title}", text, grid(figures))


def host_time(result: Row) -> str:
    """The time of Python alone, with the launch of a kernel replaced where there is no GPU."""
    groups: dict[str, dict[str, list[Bar]]] = {}
    for row in result["rows"]:
        words = f"{row['impl']}, {row['what']}: {row['us']:.1f} us (20 % {row['us_20']:.1f}, 80 % {row['us_80']:.1f})"
        words += "" if row["quiet"] else ", beside other load"
        title = f"{row['operation']}, {row['what']}"
        bar = Bar(row["us"], words, f"{row['us']:.1f} us")
        groups.setdefault(title, {}).setdefault(f"{row['impl']} ({row['launch']})", []).append(bar)
    figures = []
    for title, found in groups.items():
        rows = list(found.items())
        figures.append(figure(title, bars.amounts(title, rows, " us"), _values(rows, ("time",))))
    text = "The time of one call at one token. <i>replaced</i>: the launch of the kernel is a call that does nothing."
    return section("host", "Host time of one call", text, grid(figures))


def first_call(result: Row) -> str:
    """The time of a new process until its first forward and backward has ended, as stacked bars."""
    rows: list[tuple[str, list[Bar]]] = []
    for row in sorted(result["rows"], key=lambda row: row["total_ms"]):
        seconds = f"{row['total_ms'] / 1e3:.2f} s"
        parts = []
        for index, phase in enumerate(PHASES[:-1]):
            ms = row[f"{phase}_ms"]
            parts.append(Bar(ms / 1e3, f"{row['provider']}, {phase}: {report.duration(ms)}", seconds, f"phase{index}"))
        rows.append((row["provider"], parts))
    head = ("", "total", "20 %", "80 %", "of the processor", *PHASES)
    keys = ("total_ms", "total_ms_q20", "total_ms_q80", "cpu_ms", *(f"{phase}_ms" for phase in PHASES))
    cells = [(row["provider"], *(report.duration(row[key]) for key in keys)) for row in result["rows"]]
    title = f"First forward and backward of a new process, {result['tokens']} tokens"
    text = (
        "From the start of Python to the end of the first forward and backward, in parts from light to dark: Python, "
        "imports, making the module, the call. The caches of torch.compile on disk are empty. The second chart is the "
        "time of the processor until then. Compare it if other programs ran beside these."
    )
    chart = figure(title, bars.amounts(title, rows, " s", stacked=True), table(head, cells))
    used = [(row["provider"], row["cpu_ms"] / 1e3) for row in sorted(result["rows"], key=lambda row: row["cpu_ms"])]
    of_cpu = [(name, [Bar(s, f"{name}: {s:.2f} s of the processor", f"{s:.2f} s")]) for name, s in used]
    title = "The same, time of the processor"
    chart += figure(title, bars.amounts(title, of_cpu, " s"), _values(of_cpu, ("time",)))
    absent = "".join(f"<p>Absent: {row['provider']}: {row['reason']}</p>" for row in result["absent"])
    return section("first", "The first call", text, grid([chart]), absent)
