"""Lists of names in many languages, from the translations of the package iso-codes of Debian.

A list holds names of countries, languages, currencies and regions, one after the other. Names of
the training lists are not in the test lists, in any language.
"""

from __future__ import annotations

import gettext
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path

from package_data import debian_folder
from tagging import Sentence

ISO_CODES = ("iso-codes", "4.15.0-1", "b1beb869303229c38288d4ddacfd582c91f594759b5767c9cecebd87f16ff70e")
KINDS = {  # its part of iso-codes, and the keys of a name in it
    "COUNTRY": ("3166-1", ("common_name", "name")),
    "LANGUAGE": ("639-2", ("common_name", "name")),
    "CURRENCY": ("4217", ("name",)),
    "REGION": ("3166-2", ("name",)),
}
BETWEEN = ("", "", ",", "–", "/")
LENGTHS, TEST_SHARE = (2, 3, 4), 0.3


def name_lists(language: str, part: str, count: int, folder: Path) -> list[Sentence]:
    """Lists in that language, of the part "train" or "test". The same ones each time.

    Raises:
        UnavailableError: the package cannot be had.
        ValueError: the language has no translations.
    """
    names = _names(language, part, debian_folder(ISO_CODES, folder) / "usr/share")
    generator = random.Random(f"{language} {part}")
    return [_list(names, generator) for _ in range(count)]


def _list(names: dict[str, list[str]], generator: random.Random) -> Sentence:
    sentence: Sentence = []
    for _ in range(generator.choice(LENGTHS)):
        between = generator.choice(BETWEEN)
        if sentence and between:
            sentence.append((between, "O"))
        kind = generator.choice(list(names))
        words = generator.choice(names[kind]).split()
        sentence += [(word, f"{'I' if number else 'B'}-{kind}") for number, word in enumerate(words)]
    return sentence


def _names(language: str, part: str, share: Path) -> dict[str, list[str]]:
    """The names of each kind that belong to that kind and that part alone."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for kind, (standard, keys) in KINDS.items():
        entries = json.loads((share / f"iso-codes/json/iso_{standard}.json").read_text(encoding="utf-8"))[standard]
        english = [next(entry[key] for key in keys if key in entry) for entry in entries]
        for name, own in zip(english, _translated(language, kind, english, share), strict=True):
            if own is not None:
                found[own].add((kind, _part(name)))
    return {kind: sorted(own for own, places in found.items() if places == {(kind, part)}) for kind in KINDS}


def _translated(language: str, kind: str, english: list[str], share: Path) -> list[str | None]:
    """The names in that language; None for those that are not translated."""
    if language == "en":
        return list(english)
    standard, _ = KINDS[kind]
    catalogue = share / f"locale/{language}/LC_MESSAGES/iso_{standard}.mo"
    if not catalogue.is_file():
        raise ValueError(f"iso-codes has no names of kind {kind} in {language!r}")
    with catalogue.open("rb") as file:
        translations = gettext.GNUTranslations(file)
    return [own if (own := translations.gettext(name)) != name else None for name in english]


def _part(name: str) -> str:
    """The part of an English name, and so of its translations: by a hash of it."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "test" if number < TEST_SHARE else "train"
