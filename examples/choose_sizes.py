"""What phm_dim, phm_rank and the reduction factor do to the error on handwritten digits.

    python examples/choose_sizes.py --out sizes

Each of the three varies while the others are 4, 1 and 16, in the small vision transformer of
train_digits.py. All Compacter adapters have one learning rate. It writes sizes.json, and the table
as sizes.txt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import compacter_kernels as ck
from compacter_kernels.machine import describe
from digits_data import load_tasks
from digits_methods import METHODS, PHM_INIT_RANGE, Method, add_adapters
from digits_model import VisionTransformer
from train_common import table
from train_digits import Experiment, Settings
from train_options import PRETRAINING_STEPS, STEPS

SEEDS = 3


class Sizes(NamedTuple):
    """The sizes of Compacter adapters; without phm_dim, of plain bottleneck adapters."""

    phm_dim: int | None = 4
    phm_rank: int = 1
    reduction_factor: int = 16

    def method(self) -> Method:
        """The method of train_digits.py that puts such adapters into the blocks."""
        rates = METHODS["adapter" if self.phm_dim is None else "compacter"].rates
        return Method(str(self), str(self), str(self), rates, self._prepare)

    def _prepare(self, model: VisionTransformer) -> None:
        make: Callable[..., nn.Module]
        if self.phm_dim is None:
            make = partial(ck.BottleneckAdapter, activation="gelu_new")
        else:
            n = self.phm_dim
            rule = nn.Parameter(PHM_INIT_RANGE * torch.randn(n, n, n))  # one, shared by all adapters
            make = partial(ck.CompacterAdapter, phm_dim=n, phm_rank=self.phm_rank, phm_rule=rule)
        adapter = partial(make, model.hidden_size, reduction_factor=self.reduction_factor)
        add_adapters(model, adapter, after_attention=True)


VARIED = (
    *(Sizes(phm_dim=n) for n in (1, 2, 4, 8)),
    *(Sizes(phm_rank=r) for r in (2, 4)),
    *(Sizes(reduction_factor=factor) for factor in (32, 4)),
    Sizes(phm_dim=None),
)


def measured(seeds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each sizes, with the errors of all seeds in percent."""
    experiment = Experiment(*load_tasks(), Settings(steps, seeds, (), PRETRAINING_STEPS, 0, search=False))
    experiment.pretrain()
    rows = []
    for sizes in VARIED:
        row = experiment.adapt(sizes.method())
        kept = {name: row[name] for name in ("trainable_parameters", "learning_rate")}
        rows.append({**sizes._asdict(), **kept, "errors": [100 - accuracy for accuracy in row["accuracies"]]})
        print(rows[-1], file=sys.stderr)
    return rows


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    cells = [
        (
            "plain" if row["phm_dim"] is None else str(row["phm_dim"]),
            "" if row["phm_dim"] is None else str(row["phm_rank"]),
            str(row["reduction_factor"]),
            f"{row['trainable_parameters']:,}",
            f"{statistics.mean(row['errors']):.2f} ± {statistics.stdev(row['errors']):.2f}",
            f"{row['learning_rate']:g}",
        )
        for row in rows
    ]
    return table(("n", "r", "factor", "trained", "error %", "rate"), cells, left=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with all sizes, print the table and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each sizes, at least 2 ({SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run ({STEPS})")
    parser.add_argument("--out", type=Path, default=Path("sizes"), help="the folder of the results (sizes)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measured(args.seeds, args.steps)
    document = {"machine": describe(), "settings": {"seeds": args.seeds, "steps": args.steps}, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sizes.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (args.out / "sizes.txt").write_text(text(rows) + "\n", encoding="utf-8")
    print(text(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
