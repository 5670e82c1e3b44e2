"""The parts that the training scripts share: learning rate, plain adapter, tables and files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

WARM_UP = 0.1  # part of the steps


def schedule(step: int, steps: int) -> float:
    """The factor on the learning rate: it rises for a tenth of the steps, then falls to near 0."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


class BottleneckAdapter(nn.Module):
    """x + up(gelu(down(x))) with two full matrices (Houlsby et al., arXiv 1902.00751)."""

    def __init__(self, hidden_size: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck)
        self.up = nn.Linear(bottleneck, hidden_size)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) -> the same shape."""
        y: Tensor = x + self.up(F.gelu(self.down(x), approximate="tanh"))
        return y


def prepare_out(out: Path) -> Path:
    """Make the folder for the results.

    Raises:
        OSError: the folder cannot be made, or not be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"--out {out} cannot be written to")
    return out


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Columns under their header, the first `left` aligned to the left, the others to the right."""
    lines = [tuple(header), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same keys, which become the header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write the file in one move: a reader sees all of it, or the file that it replaces."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
