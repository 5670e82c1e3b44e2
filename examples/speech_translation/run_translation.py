"""Translate English speech by Whisper with adapters for each language, in mixed batches.

    python examples/speech_translation/run_translation.py --out out/speech_translation

Whisper base is frozen, and its decoder gets Compacter adapters. Recorded English prompts are
translated without adapters, with one adapter that all languages share, and with one adapter for
each language. README.md says what comes out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # package_data, which examples share

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor
from transformers import WhisperFeatureExtractor, logging

import compacter_kernels as ck
from compacter_kernels.machine import describe
from package_data import UnavailableError
from prompts import LANGUAGES, RATE, Prompt, read_prompts, split
from translation import SHARED, WAYS, Row, adapter_for, add_adapters, encode, train, translate
from translation_report import table, write
from whisper_base import END, load_whisper

SECONDS = 4  # of the longest prompt
POSITIONS = 250  # of the encoder that the decoder gets: 5 seconds; the others, of the silence that is added, are cut
PROMPTS = 8  # of a batch of `generate`: each in all languages


class Translator:
    """Whisper, its tokenizer, and the encoder's outputs for prompts."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        self.model, self.tokenizer = load_whisper(folder)
        speech = [prompt.speech.numpy() for prompt in prompts]
        features = WhisperFeatureExtractor()(speech, sampling_rate=RATE, return_tensors="pt").input_features
        outputs = encode(self.model, features, POSITIONS)
        self.states = {prompt.name: own for prompt, own in zip(prompts, outputs, strict=True)}

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, which begins with a space."""
        found: list[int] = self.tokenizer.encode(f" {text}", add_special_tokens=False).ids
        return found

    def words(self, prompts: Sequence[Prompt]) -> Tensor:
        """All tokens of the texts in all languages, and the end: over these goes the loss."""
        found = {token for prompt in prompts for text in prompt.text.values() for token in self.tokens(text)}
        return torch.tensor(sorted({*found, self.tokenizer.token_to_id(END)}))

    def texts(self, prompts: Sequence[Prompt], way: str, languages: Sequence[str]) -> dict[str, list[str]]:
        """The texts by language. A batch holds some prompts, each in all these languages."""
        found: dict[str, list[str]] = {language: [] for language in languages}
        in_order = sorted(prompts, key=lambda prompt: len(prompt.speech))  # of about equal lengths
        place = {prompt.name: number for number, prompt in enumerate(in_order)}
        for start in range(0, len(in_order), PROMPTS):
            pairs = [(prompt, language) for prompt in in_order[start : start + PROMPTS] for language in languages]
            states = torch.stack([self.states[prompt.name] for prompt, _ in pairs])
            asked = [language for _, language in pairs]
            out = translate(self.model, states, asked, [adapter_for(way, language) for language in asked])
            for language, tokens in zip(asked, out, strict=True):
                found[language].append(self.tokenizer.decode(tokens).strip())
        return {language: [own[place[prompt.name]] for prompt in prompts] for language, own in found.items()}


def scores(texts: dict[str, list[str]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """chrF and BLEU of each language."""
    metrics = {"chrf": CHRF(), "bleu": BLEU()}
    return {
        name: {
            language: metric.corpus_score(own, [[prompt.text[language] for prompt in prompts]]).score
            for language, own in texts.items()
        }
        for name, metric in metrics.items()
    }


def signatures() -> dict[str, str]:
    """The signatures of sacrebleu for these scores."""
    metrics = {"chrf": CHRF(), "bleu": BLEU()}
    for metric in metrics.values():
        metric.corpus_score(["one"], [["one"]])
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train and translate with every seed. After each of them, gives what is written as JSON."""
    start = time.monotonic()
    parts = {name: own[: args.limit] for name, own in split(read_prompts(args.cache, SECONDS)).items()}
    to_learn, to_test = parts["train"], parts[args.part]
    translator = Translator(args.cache, [*to_learn, *to_test])
    model = translator.model
    print(f"speech of {len(translator.states)} prompts is encoded, {time.monotonic() - start:.0f} s", flush=True)
    rows = [
        Row(translator.states[prompt.name], language, translator.tokens(prompt.text[language]))
        for prompt in to_learn
        for language in LANGUAGES
    ]
    words = translator.words(to_learn)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    document: dict[str, Any] = {
        "machine": describe(),
        "settings": {name: getattr(args, name) for name in ("seeds", "epochs", "rate", "part")},
        "sizes": {"train": len(to_learn), "test": len(to_test), "positions": POSITIONS, "words": len(words)},
        "signatures": signatures(),
        "runs": runs,
    }
    for seed in range(args.seeds):
        add_adapters(model, [SHARED, *LANGUAGES], seed)
        for way in WAYS if seed == 0 else WAYS[1:]:  # without adapters there is nothing to draw
            names = sorted({name for language in LANGUAGES if (name := adapter_for(way, language)) is not None})
            trained = sum(p.numel() for name in names for _, p in ck.adapter_parameters(model, name))
            losses = train(model, way, rows, words, seed, args.epochs, args.rate) if names else []
            texts = translator.texts(to_test, way, LANGUAGES)
            found = {"seed": seed, "trained": trained, "losses": losses, **scores(texts, to_test)}
            runs[way].append({**found, "first_texts": {language: own[:3] for language, own in texts.items()}})
            means = ", ".join(f"{name} {sum(found[name].values()) / len(LANGUAGES):.1f}" for name in ("chrf", "bleu"))
            print(f"seed {seed}: {way}, {means}, {time.monotonic() - start:.0f} s", flush=True)
        if seed == 0:
            alone = [translator.texts(to_test, way, [language])[language] for language in LANGUAGES]
            document["english"] = scores(translator.texts(to_test, "zero-shot", ["en"]), to_test)["chrf"]["en"]
            document["differ"] = different(list(texts.values()), alone)
        ck.remove_adapters(model)
        yield document


def different(some: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> int:
    """How many texts differ."""
    pairs = zip(some, others, strict=True)
    return sum(one != other for own, of_others in pairs for one, other in zip(own, of_others, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 with the reason if a package cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=("dev", "test"), default="test", help="the prompts to translate")
    parser.add_argument("--quick", action="store_true", help="one seed and few prompts: a minute")
    parser.add_argument("--cache", type=Path, default=Path("build/speech_translation"), help="where packages are kept")
    parser.add_argument("--out", type=Path, help="a folder for translation.json and translation.txt")
    args = parser.parse_args(arguments)
    args.limit = None
    if args.quick:
        args.seeds, args.epochs, args.limit = 1, 3, 8
    logging.set_verbosity_error()  # `generate` warns of what Whisper's own one does
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
