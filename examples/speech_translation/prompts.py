"""Recorded telephone prompts in English with their translations, from packages of Debian.

The packages asterisk-core-sounds-en-wav and asterisk-core-sounds-{en,es,fr,it,ru} hold recordings
at 8 kHz, and for each language a text of lines "name: what is said".
"""

from __future__ import annotations

import gzip
import hashlib
import string
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from package_data import debian_folder

VERSION = "1.6.1-1"
SPEECH = "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"
TEXTS = {
    "en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "es": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "it": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "ru": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
}
LANGUAGES = ("es", "fr", "it", "ru")  # of the translations
RATE = 16000  # of Whisper
SHARES = {"test": 0.3, "dev": 0.1}  # the others train


class Prompt(NamedTuple):
    """The name of a prompt, its English speech at 16 kHz (samples,), and its text by language."""

    name: str
    speech: Tensor
    text: dict[str, str]


def read_prompts(folder: Path, seconds: float) -> list[Prompt]:
    """The prompts of two English words or more that are no longer than that, by their names.

    The packages are fetched into the folder.

    Raises:
        UnavailableError: a package cannot be had.
    """
    texts = {language: _transcripts(language, digest, folder) for language, digest in TEXTS.items()}
    (sounds,) = (debian_folder(("asterisk-core-sounds-en-wav", VERSION, SPEECH), folder)).glob("usr/share/*/sounds/en*")
    prompts = []
    for name in sorted(set.intersection(*map(set, texts.values()))):
        text = {language: own[name] for language, own in texts.items()}
        if len(text["en"].split()) > 1 and not any(own.startswith(("[", "(", "<")) for own in text.values()):
            speech = resampled(_samples(sounds / f"{name}.wav"))
            if len(speech) <= seconds * RATE:
                prompts.append(Prompt(name, speech, text))
    return prompts


def _transcripts(language: str, digest: str, folder: Path) -> dict[str, str]:
    """What is said, by the name of the prompt. Lines of comments start with a semicolon."""
    name = f"asterisk-core-sounds-{language}"
    path = debian_folder((name, VERSION, digest), folder) / f"usr/share/doc/{name}/core-sounds-{language}.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    pairs = (line.partition(":") for line in lines if not line.startswith(";"))
    return {key.strip(): " ".join(text.split()) for key, colon, text in pairs if colon and text.strip()}


def _samples(path: Path) -> Tensor:
    """The samples of a recording of 16 bits and one channel, between -1 and 1."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getsampwidth(), file.getnchannels()) != (RATE // 2, 2, 1):
            raise ValueError(f"{path} is not a recording of 8 kHz, 16 bits and one channel")
        return torch.from_numpy(np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(2**15))


def resampled(samples: Tensor) -> Tensor:
    """Twice as many samples of the same sound: the higher half of the spectrum is 0."""
    twice: Tensor = torch.fft.irfft(torch.fft.rfft(samples), 2 * len(samples)) * 2
    return twice


def said(prompt: Prompt) -> str:
    """The English words without case and punctuation."""
    return " ".join(prompt.text["en"].lower().translate(str.maketrans("", "", string.punctuation)).split())


def split(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """The parts "train", "dev" and "test", by a hash of the names.

    English words that the test part has are in no other part, and those of dev do not train.
    """
    parts: dict[str, list[Prompt]] = {"test": [], "dev": [], "train": []}
    for prompt in prompts:
        parts[_part(prompt.name)].append(prompt)
    taken: set[str] = set()
    for part, own in parts.items():
        parts[part] = [prompt for prompt in own if said(prompt) not in taken]
        taken |= {said(prompt) for prompt in own}
    return parts


def _part(name: str) -> str:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    for part, share in SHARES.items():
        if number < share:
            return part
        number -= share
    return "train"
