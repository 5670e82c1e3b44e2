"""The results as a picture: time over one clone of x, against the number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compacter_kernels.bench.cost import DIRECTIONS


def require() -> None:
    """Raise an error that says what to install where matplotlib is not there; before the work, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'compacter-kernels[plot]', or leave them out with --no-plot"
        ) from error


def write(table: dict[str, Any], title: str, path: Path) -> Path:
    """One panel for each direction and shape of the table, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["k"], row["d"], row["n"]) for row in table["rows"]))
    providers = list(dict.fromkeys(row["provider"] for row in table["rows"]))
    figure = Figure(figsize=(1 + 3.2 * max(1, len(shapes)), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(DIRECTIONS), max(1, len(shapes)), squeeze=False, sharex="col", sharey="row")
    for direction, line in zip(DIRECTIONS, grid, strict=True):
        for shape, axes in zip(shapes, line, strict=False):
            for index, provider in enumerate(providers):
                rows = [
                    row
                    for row in table["rows"]
                    if (row["k"], row["d"], row["n"]) == shape
                    and (row["provider"], row["direction"]) == (provider, direction)
                ]
                if rows:
                    axes.plot(
                        [row["tokens"] for row in rows],
                        [row["over_clone"] for row in rows],
                        marker="o",
                        color="black" if provider == "copy" else f"C{index}",
                        linestyle="--" if provider == "copy" else "-",
                        label=provider,
                    )
            axes.set(title=f"{'/'.join(map(str, shape))}, {direction}", xscale="log", yscale="log", xlabel="tokens")
            axes.grid(alpha=0.3, which="both")
        line[0].set_ylabel("time / time of x.clone()")
    grid[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path
