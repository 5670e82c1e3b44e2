"""The roofline: the rate of operations over operations per byte, below the rates of the machine.

The operations and bytes are those of the fused kernel (`cost`). The slanted roof is the bandwidth
of a large copy, and the flat one the rate of a float32 matrix product, measured in the same run.
"""

from __future__ import annotations

from compacter_kernels.bench import cost
from compacter_kernels.bench.report import duration
from compacter_kernels.bench.report_page.look import look
from compacter_kernels.bench.report_page.results import Row, Sweep
from compacter_kernels.bench.report_page.svg import Log, chart, label, mark, number, tag
from compacter_kernels.cases import Shape
from compacter_kernels.options import DTYPES

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 320, 56, 14, 14, 38
SHOWN = ("dense", "factored", "adapters")  # beside ours; they compute the same function


def _intensity(row: Row, itemsize: int) -> float:
    shape = Shape(row["k"], row["d"], row["n"])
    return cost.flops(shape, 1, row["direction"]) / cost.traffic(shape, 1, row["direction"], itemsize)


def panel(sweep: Sweep, direction: str) -> str:
    """Return the chart of one direction, "" where a rate was not measured."""
    rates, itemsize = sweep.table["rates"], DTYPES[sweep.settings["dtype"]].itemsize
    peak, bandwidth = rates.get("sgemm_gflops"), rates["copy_gb_per_s"]
    shown = [row for row in sweep.select(direction=direction) if row["provider"] in (sweep.ours, *SHOWN)]
    if not peak or not shown:
        return ""
    points = [(row, _intensity(row, itemsize)) for row in shown]
    speeds = [cost.flops(Shape(r["k"], r["d"], r["n"]), r["tokens"], direction) / r["ms"] / 1e6 for r, _ in points]
    lowest, highest = min(i for _, i in points) / 2, max(*(i for _, i in points), peak / bandwidth) * 2
    x = Log(lowest, highest, LEFT, WIDTH - RIGHT)
    y = Log(min(*speeds, bandwidth * lowest) / 1.4, max(*speeds, peak) * 1.6, HEIGHT - BOTTOM, TOP)
    axes = [tag("path", d=f"M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}") for v in y.ticks()]
    axes += [label(number(v), LEFT - 5, y(v) + 4) for v in y.ticks()]
    axes += [label(number(v), x(v), HEIGHT - BOTTOM + 15, class_="middle") for v in x.ticks()]
    axes.append(label("operations per byte", (LEFT + WIDTH) / 2, HEIGHT - 5, class_="middle"))
    axes.append(label("GFLOP/s", 4, TOP - 3, class_="start"))
    knee = peak / bandwidth
    roof = f"M{x(lowest):.1f} {y(bandwidth * lowest):.1f}L{x(knee):.1f} {y(peak):.1f}H{x(highest):.1f}"
    roofs = tag(
        "g",
        tag("path", d=roof),
        label(f"copy, {bandwidth:.0f} GB/s", x(lowest) + 4, y(bandwidth * lowest) + 16, class_="start"),
        label(f"sgemm, {peak:.0f} GFLOP/s", WIDTH - RIGHT, y(peak) - 5),
        class_="roof",
    )
    marks = []
    for (row, intensity), speed in zip(points, speeds, strict=True):
        shape = f"{row['k']}/{row['d']}/{row['n']}"
        words = f"{row['provider']}, {shape}, {row['tokens']} tokens: {number(speed)} GFLOP/s at {intensity:.2f} "
        words += f"operations per byte, {duration(row['ms'])}"
        size = 2.2 + 0.45 * len(str(row["tokens"]))
        dot = mark("circle", words, cx=x(intensity), cy=y(speed), r=size)
        marks.append(tag("g", dot, class_=f"series dots {look(row['provider'])}"))
    title = f"{direction}: roofline"
    return chart(title, WIDTH, HEIGHT, tag("g", *axes, class_="axes"), *marks, roofs)
