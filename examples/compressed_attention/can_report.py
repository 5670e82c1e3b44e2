"""The results as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

ACCURACY_HEAD = "| rows wholly right | base | with adapters |\n|---|---|---|\n"
ACCURACY_LEGEND = """
In percent, mean and standard deviation of {seeds} seeds. For each task {trained:,} numbers train, beside {base:,} of
the base. The largest difference of scores is {loaded:.0g} after saving and loading, {separate:.0g} between a routed
batch and separate batches, and {uncached:.0g} between cached and uncached decoding.

"""
SPEED_HEAD = """\
| batch | standard | compressed | ratio | standard, adapters | compressed, adapters | ratio |
|---|---|---|---|---|---|---|
"""
SPEED_LEGEND = """
The time of a token with cached keys and values: {layers} layers of {heads} heads, d = {hidden}, V and feed-forward
{inner} wide, {source} positions of the source, {tokens} tokens. *Ratio*: standard / compressed, so the compressed
decoder is faster above 1. fp32, {threads} thread of a {cores}-core {cpu}, torch {torch}, medians of {rounds} rounds
in turns. A `*` marks a time that was measured beside other load.
"""


def percent(values: Sequence[float]) -> str:
    """The mean of the seeds, with their standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def accuracies(runs: Sequence[dict[str, Any]]) -> str:
    """The table of what the base and the adapters learned."""
    lines = []
    for task in runs[0]["tasks"]:
        scores = [run["tasks"][task] for run in runs]
        cells = [percent([s[key] for s in scores]) if key in scores[0] else "" for key in ("base", "adapted")]
        lines.append(f"| {task} | {cells[0]} | {cells[1]} |\n")
    worst = {key: max(run["differences"][key] for run in runs) for key in runs[0]["differences"]}
    sizes = {key: runs[0][key] for key in ("trained", "base")}
    return ACCURACY_HEAD + "".join(lines) + ACCURACY_LEGEND.format(seeds=len(runs), **sizes, **worst)


def speeds(speed: dict[str, Any], machine: dict[str, Any]) -> str:
    """The table of times; a * where other load disturbed too many samples."""
    lines = []
    for row in speed["rows"]:
        cells = [str(row["batch"])]
        for end in ("", ", adapters"):
            both = [row["times"][f"{kind}{end}"] for kind in ("standard", "compressed")]
            cells += [f"{time['ms']:.2f} ms{'' if time['quiet'] else '*'}" for time in both]
            cells.append(f"{both[0]['ms'] / both[1]['ms']:.2f}")
        lines.append(f"| {' | '.join(cells)} |\n")
    return SPEED_HEAD + "".join(lines) + SPEED_LEGEND.format(**{**machine, **speed["sizes"], **speed})


def table(document: dict[str, Any]) -> str:
    """Both tables, as the README shows them."""
    return accuracies(document["runs"]) + speeds(document["speed"], document["machine"])
