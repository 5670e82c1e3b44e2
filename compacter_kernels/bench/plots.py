"""The results as pictures: the time over that of one clone of x, against the number of tokens."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from compacter_kernels.bench.cost import DIRECTIONS


def require() -> None:
    """Raise an error that says what to install where matplotlib is missing, before the work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'compacter-kernels[plot]', or leave them out with --no-plot"
        ) from error


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw one PNG for each table that has rows, and return the paths."""
    paths = []
    for table in report["tables"]:
        if not table["rows"]:
            continue
        name, title = "bench", report["settings"]["dtype"]
        if "device" in table:
            title += f", {table['device']['gpu']}, cold"
        else:
            name += f"_faults_{table['page_faults']}"
            title += f", {table['machine']['threads']} threads, page faults {table['page_faults']}"
        paths.append(folder / f"{name}.png")
        _draw(table["rows"], title, paths[-1])
    return paths


def _draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw one panel for each direction and shape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        key = (row["direction"], (row["k"], row["d"], row["n"]), row["provider"])
        lines.setdefault(key, []).append((row["tokens"], row["over_clone"]))
    shapes, providers = (list(dict.fromkeys(key[i] for key in lines)) for i in (1, 2))
    figure = Figure(figsize=(1 + 3.2 * len(shapes), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(DIRECTIONS), len(shapes), squeeze=False, sharex="col", sharey="row")
    for axes, (direction, shape) in zip(grid.flat, product(DIRECTIONS, shapes), strict=True):
        for index, provider in enumerate(providers):
            color, style = ("black", "--") if provider == "copy" else (f"C{index}", "-")
            if points := lines.get((direction, shape, provider)):
                axes.plot(*zip(*points, strict=True), style, color=color, marker="o", label=provider)
        axes.set(title=f"{'/'.join(map(str, shape))}, {direction}", xscale="log", yscale="log", xlabel="tokens")
        axes.grid(alpha=0.3, which="both")
    for axes in grid[:, 0]:
        axes.set_ylabel("time / time of x.clone()")
    grid[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
