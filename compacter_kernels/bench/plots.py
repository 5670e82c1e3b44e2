"""The results as pictures: the time over that of one clone of x, against the number of tokens."""

from __future__ import annotations

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

    shapes = list(dict.fromkeys((row["k"], row["d"], row["n"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure = Figure(figsize=(1 + 3.2 * len(shapes), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(DIRECTIONS), len(shapes), squeeze=False, sharex="col", sharey="row")
    for i, direction in enumerate(DIRECTIONS):
        for axes, shape in zip(grid[i], shapes, strict=True):
            for index, provider in enumerate(providers):
                here = (*shape, provider, direction)
                names = ("k", "d", "n", "provider", "direction")
                points = [(r["tokens"], r["over_clone"]) for r in rows if tuple(r[name] for name in names) == here]
                style = ("black", "--") if provider == "copy" else (f"C{index}", "-")
                if points:
                    axes.plot(*zip(*points, strict=True), style[1], color=style[0], marker="o", label=provider)
            axes.set(title=f"{'/'.join(map(str, shape))}, {direction}", xscale="log", yscale="log", xlabel="tokens")
            axes.grid(alpha=0.3, which="both")
        grid[i][0].set_ylabel("time / time of x.clone()")
    grid[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
