"""Tag names in languages without an adapter, by a mix of the adapters of other languages (EMEA).

    python examples/emea/run_emea.py --out out/emea

The encoder is multilingual-e5-small, frozen, with Compacter adapters in its top layers. The first
language of --bank trains its adapter and the head; each other one goes on from it for this head.
Then each sentence of the --test languages is tagged with one adapter, with the equal mix, and with
the mix that minimises the entropy. README.md says what comes out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # package_data, which examples share

import torch
from torch.nn import functional as F

import compacter_kernels as ck
from compacter_kernels.machine import describe
from e5_encoder import load_encoder
from emea_report import table, write
from name_lists import name_lists
from package_data import UnavailableError
from tagging import NO_LABEL, Counts, Encoded, Sentence, Tagger, read_sentences

TOP, TRAIN_BATCH, TEST_BATCH, WARM_UP = 6, 16, 32, 0.1
STEPS, LR = (1, 10), 10.0  # of minimise_entropy, as the authors'
BANK, TEST = ("en", "ru", "sv"), ("be", "uk", "da", "is")


def data_of(args: argparse.Namespace) -> tuple[dict[str, list[Sentence]], dict[str, list[Sentence]]]:
    """The training and the test sentences by language: lists of names, or the files of --data."""
    if args.data is None:
        train = {language: name_lists(language, "train", args.train, args.cache) for language in args.bank}
        return train, {language: name_lists(language, "test", args.limit, args.cache) for language in args.test}
    train = {language: read_sentences(args.data / f"{language}.train.tsv", args.train) for language in args.bank}
    return train, {language: read_sentences(args.data / f"{language}.test.tsv", args.limit) for language in args.test}


def labels_of(data: dict[str, list[Sentence]]) -> list[str]:
    """All labels, in order."""
    return sorted({label for sentences in data.values() for sentence in sentences for _, label in sentence})


def with_adapters(tagger: Tagger, bank: Sequence[str], seed: int) -> Tagger:
    """The tagger with adapters of each language, after the feed-forward block of each top layer."""
    targets = [f"upper.layer.{layer}.output.dense" for layer in range(len(tagger.upper.layer))]
    config = ck.CompacterConfig(
        reduction_factor=8,
        target_modules=targets,
        train_layer_norms=False,
        modules_to_save=[],
        phm_init_range=0.5,
    )
    for number, language in enumerate(bank):
        torch.manual_seed(100 * seed + number)
        ck.inject(tagger, config, name=language)
    return tagger


def copy_adapter(tagger: Tagger, source: str, target: str) -> None:
    """Give the adapter of one language the values of another's."""
    of_source, of_target = (list(ck.adapter_parameters(tagger, name)) for name in (source, target))
    with torch.no_grad():
        for (_, value), (_, parameter) in zip(of_source, of_target, strict=True):
            parameter.copy_(value)


def rates(steps: int, rate: float) -> Iterator[float]:
    """The learning rate of each step: it rises for a tenth of them, then falls to 0."""
    for step in range(steps):
        yield rate * min((step + 1) / (WARM_UP * steps), (steps - step) / steps)


def train(tagger: Tagger, language: str, data: Encoded, args: argparse.Namespace, seed: int, head: bool) -> float:
    """Train the adapter of a language, with the head too if asked. Returns the last mean loss."""
    ck.set_adapter(tagger, language)
    tagger.head.requires_grad_(head)
    trained = [p for p in tagger.parameters() if p.requires_grad]
    epochs = args.epochs * (2 if head else 1)
    optimizer = torch.optim.AdamW(trained, args.rate, weight_decay=0.01)
    schedule = rates(epochs * -(-len(data.rows) // TRAIN_BATCH), args.rate)
    losses: list[float] = []
    for epoch in range(epochs):
        losses.clear()
        for batch in data.batches(TRAIN_BATCH, seed=1000 * seed + epoch):
            for group in optimizer.param_groups:
                group["lr"] = next(schedule)
            logits = tagger(batch.hidden, batch.mask)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=NO_LABEL)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    tagger.requires_grad_(False)
    return sum(losses) / len(losses)


def evaluate(tagger: Tagger, bank: Sequence[str], data: Encoded) -> dict[str, Any]:
    """F1 and mean entropy of each way to tag the sentences, and the mean weights of the mixes."""
    single = {language: [language] for language in bank}
    ways = {**dict.fromkeys(single, 0), "uniform": 0, **{f"{steps} step{'s' * (steps > 1)}": steps for steps in STEPS}}
    counts = {way: Counts() for way in ways}
    entropy, weights = dict.fromkeys(ways, 0.0), {way: torch.zeros(len(bank)) for way in ways if way not in single}
    for batch in data.batches(TEST_BATCH):
        keep, forward = batch.labels != NO_LABEL, partial(tagger, batch.hidden, batch.mask)
        for way, steps in ways.items():
            logits, mixed = ck.minimise_entropy(tagger, forward, single.get(way, bank), steps, LR, keep)
            counts[way].add(logits, batch.labels, data.labels)
            of_tokens = torch.distributions.Categorical(logits=logits).entropy() * keep
            entropy[way] += (of_tokens.sum(1) / keep.sum(1).clamp(min=1)).sum().item() / len(data.rows)
            if way in weights:
                weights[way] += mixed.mean(1).sum(0) / len(data.rows)
    return {
        "sentences": len(data.rows),
        "f1": {way: counts[way].f1 for way in ways},
        "entropy": entropy,
        "weights": {way: of_way.tolist() for way, of_way in weights.items()},
    }


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train and evaluate with every seed. After each of them, gives what is written as JSON."""
    start = time.monotonic()
    encoder, tokenizer = load_encoder(args.cache)
    train_data, test_data = data_of(args)
    labels = labels_of(train_data)
    unknown = set(labels_of(test_data)) - set(labels)
    if unknown:
        raise ValueError(f"the test sentences have labels that no training sentence has: {', '.join(sorted(unknown))}")
    tagger = Tagger(encoder, TOP, len(labels)).eval().requires_grad_(False)
    training = {name: Encoded(tagger, tokenizer, own, labels) for name, own in train_data.items()}
    tests = {name: Encoded(tagger, tokenizer, own, labels) for name, own in test_data.items()}
    results: dict[str, list[dict[str, Any]]] = {language: [] for language in tests}
    losses: list[float] = []
    document = {
        "machine": describe(),
        "data": "lists of names of iso-codes" if args.data is None else args.data.name,
        "settings": {
            **{name: getattr(args, name) for name in ("bank", "start", "train", "epochs", "rate")},
            "top_layers": TOP,
            "lr": LR,
        },
        "losses": losses,
        "results": results,
    }
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        tagger.head.reset_parameters()
        with_adapters(tagger, args.bank, seed)
        for number, language in enumerate(args.bank):
            if number and args.start == "first":
                copy_adapter(tagger, args.bank[0], language)
            losses.append(train(tagger, language, training[language], args, seed, head=number == 0))
            print(
                f"seed {seed}: {language} trained, loss {losses[-1]:.3f}, {time.monotonic() - start:.0f} s", flush=True
            )
        for language, data in tests.items():
            results[language].append(evaluate(tagger, args.bank, data))
            f1 = ", ".join(f"{way} {value:.1f}" for way, value in results[language][-1]["f1"].items())
            print(f"seed {seed}: {language} {f1}, {time.monotonic() - start:.0f} s", flush=True)
        ck.remove_adapters(tagger)
        yield document


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 with the reason if a package cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of LANGUAGE.train.tsv and LANGUAGE.test.tsv")
    parser.add_argument("--bank", type=lambda text: text.split(","), default=list(BANK), help="languages with adapters")
    parser.add_argument("--test", type=lambda text: text.split(","), default=list(TEST), help="languages to tag")
    parser.add_argument(
        "--start",
        choices=("first", "new"),
        default="first",
        help="where the adapters of the other languages start: as the first one's is trained, or with new values",
    )
    parser.add_argument("--train", type=int, default=500, help="training sentences of each language")
    parser.add_argument(
        "--limit", type=int, help="test sentences of each language; 200 lists of names, or all of --data"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, two adapters, few sentences: a minute")
    parser.add_argument("--cache", type=Path, default=Path("build/emea"), help="where packages are kept")
    parser.add_argument("--out", type=Path, help="a folder for results.json and results.md")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.train, args.epochs, args.limit = 1, 200, 3, 24
        args.bank, args.test = args.bank[:2], args.test[:1]
    if args.data is None and args.limit is None:
        args.limit = 200
    try:
        for document in run(args):
            if args.out is not None:
                write(document, args.out)
            print(table(document), flush=True)
    except UnavailableError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
