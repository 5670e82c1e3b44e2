"""The results of run_translation.py as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seed_spread import spread

LEGEND = """
chrF / BLEU of {test} prompts of the {part} part, mean ± standard deviation of {seeds} seed{plural}; {train} others
train, {epochs} epochs. *Trained*: numbers that train. The chrF of Whisper's English transcripts is {english:.1f}.
Of {texts} translations, {differ} are others when each language is a batch of its own.
sacrebleu: chrF2 `{chrf}`, BLEU `{bleu}`.
"""
LABELS = {"zero-shot": "none (zero-shot)", "shared": "one, shared", "per language": "one for each language"}


def table(document: dict[str, Any]) -> str:
    """chrF and BLEU of each way and language, and what the scores are."""
    runs = document["runs"]
    languages = list(runs["zero-shot"][0]["chrf"])
    lines = [f"| adapters | trained | {' | '.join(languages)} | mean |\n", "|---" * (len(languages) + 3) + "|\n"]
    for way, own in runs.items():
        cells = [_cell([(run["chrf"][name], run["bleu"][name]) for run in own]) for name in languages]
        means = [tuple(statistics.mean(run[metric].values()) for metric in ("chrf", "bleu")) for run in own]
        lines.append(f"| {' | '.join([LABELS[way], format(own[0]['trained'], ','), *cells, _cell(means)])} |\n")
    about = {**document["settings"], **document["sizes"], **document["signatures"], "seeds": len(runs["shared"])}
    about |= {"texts": len(languages) * about["test"], "plural": "s" * (about["seeds"] > 1)}
    about |= {name: document[name] for name in ("english", "differ")}
    return "".join(lines) + LEGEND.format(**about)


def _cell(pairs: Sequence[Sequence[float]]) -> str:
    return " / ".join(spread(values) for values in zip(*pairs, strict=True))


def write(document: dict[str, Any], folder: Path) -> None:
    """Write translation.json and translation.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "translation.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "translation.txt").write_text(table(document), "utf-8")
