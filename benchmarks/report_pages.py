"""Writes the report pages of benchmarks/results, their index, and the plot of the README.

    python benchmarks/report_pages.py [--check]

With --check it writes nothing, and exits with 1 and the names of the files that differ from the
committed results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import readme_plot
import report_index

from compacter_kernels.bench.report_page import page
from compacter_kernels.bench.report_page.results import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOTTED = RESULTS / "epyc-2core"


def files() -> Iterator[tuple[Path, str]]:
    """Each file with the text that it should have; the index last, as it lists the pages."""
    for folder in sorted({path.parent for name in ("bench", "first_call") for path in RESULTS.glob(f"*/{name}.json")}):
        yield folder / "report.html", page.html(load(folder))
    source = (PLOTTED / "bench.json").relative_to(ROOT)
    yield ROOT / "docs" / "speed.svg", readme_plot.svg(load(PLOTTED).sweeps[0], str(source))
    yield RESULTS / "index.html", report_index.html(RESULTS)


def main() -> int:
    """Write the files, or with --check compare them."""
    stale = []
    for path, text in files():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                path.write_text(text, encoding="utf-8")
    print("\n".join(stale) or "all report pages are those of the results")
    return int("--check" in sys.argv[1:] and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
