"""The example examples/emea: its data, its model in two parts, its F1, and its short form."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from families import build

import compacter_kernels as ck
import package_data
from emea_report import table
from name_lists import name_lists
from tagging import NO_LABEL, Counts, Encoded, Tagger, names_in, read_sentences

ROOT = Path(__file__).resolve().parents[1]
CACHE, RESULTS = ROOT / "build" / "emea", ROOT / "examples" / "emea" / "results"
WIDTH = 32


class Words:
    """A tokenizer of one or two pieces for each word, between two marks."""

    def __call__(self, sentences: list[list[str]], **options: object) -> Words:
        self.words = [[None, *(i for i, word in enumerate(s) for _ in word[:2]), None] for s in sentences]
        longest = max(map(len, self.words))
        self.pieces = [[1, *(3 + ord(c) % 40 for word in s for c in word[:2]), 2] for s in sentences]
        self.mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in self.pieces])
        self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in self.pieces])
        return self

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.ids if name == "input_ids" else self.mask

    def word_ids(self, row: int) -> list[int | None]:
        return self.words[row]


def small_tagger(labels: int = 3) -> Tagger:
    torch.manual_seed(0)
    return Tagger(build("bert", num_hidden_layers=4).bert, 2, labels).eval().requires_grad_(False)


SENTENCES = [[("ab", "B-X"), ("c", "I-X"), ("de", "O")], [("f", "O")], [("gh", "B-X"), ("ij", "B-X"), ("k", "O")]]
LABELS = ["B-X", "I-X", "O"]


def test_the_two_parts_are_the_encoder() -> None:
    encoder = build("bert", num_hidden_layers=4).bert
    tokens = Words()([[word for word, _ in s] for s in SENTENCES])
    with torch.no_grad():
        whole = encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
    tagger = small_tagger()
    for row, (hidden, classes) in enumerate(Encoded(tagger, Words(), SENTENCES, LABELS).rows):
        with torch.no_grad():
            logits = tagger(hidden[None], torch.ones(1, len(hidden), dtype=torch.bool))
        assert (logits[0] - tagger.head(whole[row, : len(hidden)])).abs().max() < 1e-5
        assert [LABELS[c] for c in classes.tolist() if c != NO_LABEL] == [label for _, label in SENTENCES[row]]


def test_batches_hold_each_sentence_once() -> None:
    data = Encoded(small_tagger(), Words(), SENTENCES, LABELS)
    for seed in (None, 1):
        batches = list(data.batches(2, seed))
        assert sorted(n for b in batches for n in b.mask.sum(1).tolist()) == sorted(len(row) for row, _ in data.rows)
        assert all((b.labels[~b.mask] == NO_LABEL).all() for b in batches)


def test_each_sentence_gets_the_weights_it_has_alone() -> None:
    tagger = small_tagger()
    config = ck.CompacterConfig(
        reduction_factor=4, target_modules=["upper.layer.0.output.dense", "upper.layer.1.output.dense"],
        train_layer_norms=False, modules_to_save=[],
    )  # fmt: skip
    for name in ("en", "ru"):
        ck.inject(tagger, config, name=name)
        for _, p in ck.adapter_parameters(tagger, name):
            torch.nn.init.normal_(p, std=0.5)
    tagger.double()
    (batch,) = Encoded(tagger, Words(), SENTENCES, LABELS).batches(3)
    keep = batch.labels != NO_LABEL
    _, weights = ck.minimise_entropy(tagger, lambda: tagger(batch.hidden, batch.mask), ["en", "ru"], keep=keep)
    assert (weights - 0.5).abs().amax((1, 2)).min() > 1e-3
    for row, count in enumerate(batch.mask.sum(1).tolist()):
        own = batch.hidden[row : row + 1, :count], batch.mask[row : row + 1, :count]
        _, alone = ck.minimise_entropy(tagger, lambda own=own: tagger(*own), ["en", "ru"], keep=keep[row, None, :count])
        assert (alone[0] - weights[row]).abs().max() < 1e-12


def test_names_and_their_f1() -> None:
    assert names_in(["O", "B-X", "I-X", "B-X", "O", "I-Y", "I-X"]) == {
        (1, 3, "X"),
        (3, 4, "X"),
        (5, 6, "Y"),
        (6, 7, "X"),
    }
    counts = Counts()
    predicted = torch.nn.functional.one_hot(torch.tensor([[0, 1, 0, 2, 0]]), 3).float()
    counts.add(predicted, torch.tensor([[0, 1, 2, 0, NO_LABEL]]), LABELS)
    assert (counts.right, counts.found, counts.there) == (1, 2, 2)
    assert counts.f1 == 50.0


def test_files_of_sentences(tmp_path: Path) -> None:
    path = tmp_path / "en.test.tsv"
    path.write_text("ab\tB-X\nc\tI-X\nde\tO\n\nf\tO\n\n\ngh\tB-X\nij\tB-X\nk\tO\n", encoding="utf-8")
    assert read_sentences(path) == SENTENCES
    assert len(read_sentences(path, 2)) == 2 and read_sentences(path, 2) == read_sentences(path, 2)
    path.write_text("ab\tB-X\nc I-X\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"en\.test\.tsv, line 2: expected a word, a tab and O, B-NAME or I-NAME"):
        read_sentences(path)


def test_a_package_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"

    def pack() -> str:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("thing/data.bin", b"numbers")
        return hashlib.sha256(wheel.read_bytes()).hexdigest()

    digest = pack()
    member = package_data.wheel_file(("thing", "1.0", digest), "thing/data.bin", tmp_path)
    assert member.read_bytes() == b"numbers"
    with pytest.raises(package_data.UnavailableError, match=f"has the SHA-256 {digest}, and 00 is expected"):
        package_data.wheel_file(("thing", "1.0", "00"), "thing/data.bin", tmp_path)
    assert not wheel.exists()


def test_a_package_that_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "no-such-python")
    with pytest.raises(package_data.UnavailableError, match=r"thing==1\.0 is fetched by no-such-python"):
        package_data.wheel_file(("thing", "1.0", "00"), "thing/data.bin", tmp_path)


def test_the_readme_states_the_committed_results() -> None:
    readme = (ROOT / "examples" / "emea" / "README.md").read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        assert len({len(runs) for runs in document["results"].values()}) == 1
        assert table(document) in readme, path.name


@pytest.mark.slow
def test_the_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    import run_emea

    if run_emea.main(["--quick", "--cache", str(CACHE), "--out", str(tmp_path)]):
        pytest.skip(capsys.readouterr().err)
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (be,) = document["results"]["be"]
    assert be["sentences"] == 24 and be["entropy"]["10 steps"] < be["entropy"]["uniform"]
    parts = [written(name_lists("be", part, 400, CACHE)) for part in ("train", "test")]
    assert all(len(names) > 100 for names in parts) and not set.intersection(*parts)
    assert name_lists("be", "test", 5, CACHE) == name_lists("be", "test", 5, CACHE)
    with pytest.raises(ValueError, match="iso-codes has no names of kind CURRENCY in 'bg'"):
        name_lists("bg", "test", 1, CACHE)


def written(sentences: list[list[tuple[str, str]]]) -> set[str]:
    """The names in these sentences."""
    return {
        " ".join(word for word, _ in sentence[start:stop])
        for sentence in sentences
        for start, stop, _ in names_in([label for _, label in sentence])
    }
