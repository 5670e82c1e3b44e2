"""Translate messages of programs into several languages, with adapters for each language pair.

    python examples/catalogue_translation/run_ciat.py --out out/ciat

Stage 1 trains a small T5 for all pairs. Stage 2 goes on from it with each seed and in each way: all
of its weights, one set of adapters for all pairs, and adapters for each pair, whose pairs all train
in one routed step. README.md says what comes out.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # package_data, which examples share

import torch
from catalogues import sentences
from ciat_model import add_adapters, batches, encoded, new_model, new_tokenizer, pair_of, step, translations
from ciat_report import table, write
from sacrebleu.metrics.chrf import CHRF

import compacter_kernels as ck
from compacter_kernels.machine import describe
from package_data import UnavailableError

LANGUAGES = ("de", "es", "ru", "sv")
FIRST = "stage 1"
WAYS = {  # which adapters train in stage 2: their kind, and whether each pair has its own
    "trained on": None,
    "shared": ("Compacter", False),
    "per pair": ("Compacter", True),
    "per pair, dense": ("dense", True),
}
FULL: dict[str, Any] = {"words": 2000, "sentences": 16, "first": 3000, "second": 400, "seeds": 3, "test": None}
QUICK: dict[str, Any] = {"words": 500, "sentences": 8, "first": 30, "second": 10, "seeds": 1, "test": 8}
RATES = {FIRST: 3e-3, "trained on": 1e-3, "shared": 1e-2, "per pair": 2e-2, "per pair, dense": 2e-3}
WARM_UP, WEIGHT_DECAY = 0.05, 0.01


class Run:
    """The data, their tokenizer, and the settings of a command."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings = settings
        self.train, self.test = sentences(LANGUAGES, folder)
        self.test = self.test[: settings["test"]]
        self.tokenizer = new_tokenizer(self.train, LANGUAGES, settings["words"])

    def adapted(self, model: Any, names: Sequence[str], way: str) -> AbstractContextManager[Any]:
        """The context in which each sentence of a batch has the adapters of its pair."""
        own = WAYS.get(way)
        return ck.route(model, names) if own is not None and own[1] else nullcontext()

    def fit(self, model: Any, way: str, steps: int, seed: int) -> float:
        """Train what is to be trained; the mean loss of the last tenth of the steps."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, RATES[way], weight_decay=WEIGHT_DECAY)
        losses = []
        for number, group in enumerate(islice(batches(self.train, self.settings["sentences"], seed), steps)):
            for part in optimizer.param_groups:
                part["lr"] = RATES[way] * min((number + 1) / (WARM_UP * steps), (steps - number) / steps)
            batch = encoded(group, LANGUAGES, self.tokenizer)
            with self.adapted(model, batch.names, way):
                losses.append(step(model, batch, optimizer))
        last = losses[-max(1, steps // 10) :]
        return sum(last) / len(last)

    def chrf(self, model: Any, way: str) -> dict[str, float]:
        """chrF of each pair on the sentences for the test."""
        found = {}
        for language in LANGUAGES:
            batch = encoded(self.test, [language], self.tokenizer)
            with self.adapted(model, batch.names, way):
                texts = translations(model, batch, self.tokenizer)
            found[pair_of(language)] = CHRF().corpus_score(texts, [[own[language] for own in self.test]]).score
        return found


def stage_2(run: Run, base: Any, way: str, seed: int) -> dict[str, Any]:
    """Go on from the base in that way; what comes out."""
    torch.manual_seed(seed)
    model, own = copy.deepcopy(base), WAYS[way]
    if own is not None:
        kind, each = own
        add_adapters(model, [pair_of(language) for language in LANGUAGES] if each else ["all"], kind)
    loss = run.fit(model, way, run.settings["second"], seed + 1)
    return {
        "seed": seed,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": loss,
        "chrf": run.chrf(model, way),
    }


def results(run: Run) -> Iterator[dict[str, Any]]:
    """Both stages. After each seed of stage 2, gives what is written as JSON."""
    start = time.monotonic()
    torch.manual_seed(0)
    base = new_model(run.settings["words"])
    loss = run.fit(base, FIRST, run.settings["first"], seed=0)
    first = {"trained": sum(p.numel() for p in base.parameters()), "loss": loss, "chrf": run.chrf(base, FIRST)}
    print(f"{FIRST}: loss {loss:.2f}, chrF {_listed(first)}, {time.monotonic() - start:.0f} s", flush=True)
    ways: dict[str, list[dict[str, Any]]] = {FIRST: [first], **{way: [] for way in WAYS}}
    sizes = {"train": len(run.train), "test": len(run.test)}
    settings = {**run.settings, "rates": RATES}
    document: dict[str, Any] = {"machine": describe(), "settings": settings, "sizes": sizes, "ways": ways}
    for seed in range(run.settings["seeds"]):
        for way in WAYS:
            done = stage_2(run, base, way, seed)
            ways[way].append(done)
            seconds = time.monotonic() - start
            print(f"seed {seed}, {way}: loss {done['loss']:.2f}, chrF {_listed(done)}, {seconds:.0f} s", flush=True)
        document["seconds"] = time.monotonic() - start
        yield document


def _listed(result: dict[str, Any]) -> str:
    return ", ".join(f"{pair} {score:.1f}" for pair, score in result["chrf"].items())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 with the reason if a package cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that all parts work")
    parser.add_argument("--cache", type=Path, default=Path("build/catalogues"), help="where packages are kept")
    parser.add_argument("--out", type=Path, help="a folder for translation.json and translation.md")
    args = parser.parse_args(arguments)
    try:
        run = Run(QUICK if args.quick else FULL, args.cache)
    except UnavailableError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 1
    for document in results(run):
        if args.out is not None:
            write(document, args.out)
    print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
