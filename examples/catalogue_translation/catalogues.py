"""Short messages of programs in several languages, from message catalogues of Debian packages.

A sentence is a message in English with its translations, all in lower case. It is for training or
for the test by a hash of its English text, so that all languages of a sentence are on one side.
"""

from __future__ import annotations

import gettext
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from package_data import debian_folder

PACKAGES = (  # name, version, SHA-256
    ("evolution-common", "3.46.4-2+deb12u1", "52e3a67ba3f2815fa864f600f5e3c2afd6ebc0b3487b50525df75006d4172b46"),
    ("gimp-data", "2.10.34-1+deb12u10", "89007a69d4ef2b0440e5419e75d4112cfd1c49e97db38220d210b9f86322be7c"),
    ("gnucash-common", "1:4.13-1", "8477b415856eb671125ee63ac6a4ee1d23efeca3de6e55e5a14c6ebb32642b31"),
    ("vlc-l10n", "3.0.23-0+deb12u1", "69ab8c034e2097e1050ff62e8048e0ad5e1f72991456a34d02bcecc8a8083136"),
)
LONGEST_ENGLISH, LONGEST_OTHER, WORDS, TEST_SHARE = 28, 40, 300, 0.1
REFUSED = re.compile(r"[\n%{}<>|\\$@/=]")  # places that a program fills, and other text that is no language
Sentence = dict[str, str]  # the text in each language; "en" is English


def sentences(languages: Sequence[str], folder: Path) -> tuple[list[Sentence], list[Sentence]]:
    """Those for training and those for the test, in a fixed order.

    All languages have them, and their English words are the most frequent ones of all messages for
    training.

    Raises:
        UnavailableError: a package cannot be had.
    """
    folders = [debian_folder(package, folder) / "usr/share/locale" for package in PACKAGES]
    of_language = [_translations(folders, language) for language in languages]
    common = sorted(set.intersection(*map(set, of_language)))
    counts = Counter(word for english in common if not is_test(english) for word in set(words_of(english)))
    frequent = {word for word, _ in counts.most_common(WORDS)}
    train: list[Sentence] = []
    test: list[Sentence] = []
    for english in common:
        if frequent.issuperset(words_of(english)):
            own = {language: found[english] for language, found in zip(languages, of_language, strict=True)}
            (test if is_test(english) else train).append({"en": english, **own})
    return train, test


def is_test(english: str) -> bool:
    """Whether a sentence is for the test: by a hash of its English text."""
    return int.from_bytes(hashlib.sha256(english.encode()).digest()[:4], "big") / 2**32 < TEST_SHARE


def words_of(text: str) -> list[str]:
    """The words of a text, without signs."""
    return re.findall(r"\w+", text)


def plain(text: str) -> str:
    """The text in lower case, without marks of keys, and without colons and dots at its end."""
    return re.sub(r"_|&(?=\w)", "", text).replace("\N{NO-BREAK SPACE}", " ").rstrip(" .:…").strip().lower()


def _translations(folders: Sequence[Path], language: str) -> dict[str, str]:
    """The translation of each English text: the first one, where packages differ."""
    found: dict[str, str] = {}
    for path in (path for folder in folders for path in sorted(folder.glob(f"{language}/LC_MESSAGES/*.mo"))):
        with path.open("rb") as file:
            messages = vars(gettext.GNUTranslations(file))["_catalog"]
        for message, translation in messages.items():
            if isinstance(message, str):  # no plural forms
                english, own = plain(message.rpartition("\x04")[2]), plain(translation)  # behind its context
                if _kept(english, LONGEST_ENGLISH) and _kept(own, LONGEST_OTHER) and english != own:
                    found.setdefault(english, own)
    return found


def _kept(text: str, longest: int) -> bool:
    return 2 <= len(text) <= longest and not REFUSED.search(text) and any(map(str.isalpha, text))
