"""The example examples/catalogue_translation: its adapters, its routed steps, its data."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from example_folders import first_on_path
from plain_ciat import plain_t5
from torch import Tensor

import compacter_kernels as ck
import package_data

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "catalogue_translation"
RESULTS = ROOT / "benchmarks" / "results" / "catalogue_translation"
CACHE = ROOT / "build" / "catalogues"
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LANGUAGES = ("de", "es", "sv")
DATA = [
    {"en": "open file", "de": "datei öffnen", "es": "abrir archivo", "sv": "öppna fil"},
    {"en": "new", "de": "neu", "es": "nuevo", "sv": "ny"},
    {"en": "save the image as", "de": "bild speichern unter", "es": "guardar imagen como", "sv": "spara bilden som"},
]

_path = first_on_path(FOLDER)


def module(name: str) -> Any:
    for package in ("transformers", "tokenizers"):
        pytest.importorskip(package)
    return importlib.import_module(name)


def host(kind: str, words: int = 50) -> Any:
    """A small model in float64 with adapters of each pair, whose values are all drawn."""
    own = module("ciat_model")
    torch.manual_seed(0)
    model = own.new_model(words, width=32, layers=2).double().eval()
    own.add_adapters(model, [own.pair_of(language) for language in LANGUAGES], kind)
    with torch.no_grad():
        for _, p in ck.adapter_parameters(model):
            if p.requires_grad:
                p.normal_(std=0.5)
    return model


@pytest.mark.parametrize("kind", ["Compacter", "dense"])
def test_each_pair_is_a_plain_ciat(kind: str) -> None:
    model = host(kind)
    names = ["en_de", "en_sv", "en_es", "en_sv"]
    source, target = torch.randint(3, 50, (4, 6)), torch.randint(3, 50, (4, 5))
    with ck.route(model, names):
        logits = model(input_ids=source, decoder_input_ids=target).logits
    with ck.disable_adapters(model):
        base = model(input_ids=source, decoder_input_ids=target).logits
        for row, name in enumerate(names):
            given = {"input_ids": source[row : row + 1], "decoder_input_ids": target[row : row + 1]}
            torch.testing.assert_close(logits[row : row + 1], plain_t5(model, given, name), **EXACT)
    assert ((logits - base).abs().amax((1, 2)) > 1e-2).all()


@pytest.mark.parametrize("kind", ["Compacter", "dense"])
def test_the_adapters_are_ciat_s(kind: str) -> None:
    """Their places, and bottlenecks of d/2; none after cross-attention, none that train a norm."""
    model = host(kind)
    places = {name.rpartition(".compacter")[0] for name, _ in ck.adapter_parameters(model, "en_de")} - {""}
    stacks = [(stack, f"{stack}.block.{number}") for stack in ("encoder", "decoder") for number in range(2)]
    feed_forward = {"encoder": "layer.1.DenseReluDense.wo", "decoder": "layer.2.DenseReluDense.wo"}
    expected = {f"{block}.{end}" for stack, block in stacks for end in ("layer.0.SelfAttention.o", feed_forward[stack])}
    assert places == expected | {"encoder.block.0", "decoder.block.0"}
    adapters = [part for part in model.modules() if isinstance(part, ck.CompacterAdapter)]
    assert len(adapters) == len(LANGUAGES) * len(places)
    for adapter in adapters:
        down, up = adapter.down.weights(), adapter.up.weights()
        assert ck.phm_matrix(down).shape == (32, 16)
        if kind == "dense":
            assert torch.equal(ck.phm_matrix(down), adapter.down.W[0])
            assert torch.equal(ck.phm_matrix(up), adapter.up.W[0])


@pytest.mark.parametrize("kind", ["Compacter", "dense"])
def test_a_routed_step_is_the_steps_of_each_pair(kind: str) -> None:
    own, model = module("ciat_model"), host(kind, words=80)
    tokenizer = own.new_tokenizer(DATA, LANGUAGES, 80)
    batch = own.encoded(DATA, LANGUAGES, tokenizer)
    assert batch.names == ["en_de", "en_es", "en_sv"] * len(DATA)
    with ck.route(model, batch.names):
        mixed = own.summed_loss(model, batch)
    of_pair = {name: [p for _, p in ck.adapter_parameters(model, name) if p.requires_grad] for name in batch.names}
    gradients = dict(zip(of_pair, _cut(mixed, list(of_pair.values())), strict=True))
    alone = []
    for language in LANGUAGES:
        name = own.pair_of(language)
        ck.set_adapter(model, name)
        alone.append(own.summed_loss(model, own.encoded(DATA, [language], tokenizer)))
        for got, wanted in zip(gradients[name], torch.autograd.grad(alone[-1], of_pair[name]), strict=True):
            torch.testing.assert_close(got, wanted, **EXACT)
            assert wanted.abs().max() > 0
    torch.testing.assert_close(mixed, sum(alone), **EXACT)


def _cut(loss: Tensor, parts: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
    """The gradients of each part's parameters."""
    found = iter(torch.autograd.grad(loss, [p for part in parts for p in part]))
    return [tuple(itertools.islice(found, len(part))) for part in parts]


def test_padding_changes_no_translation() -> None:
    own, model = module("ciat_model"), host("Compacter", words=80)
    tokenizer = own.new_tokenizer(DATA, LANGUAGES, 80)
    together = own.encoded(DATA, LANGUAGES, tokenizer)
    with ck.route(model, together.names):
        texts = own.translations(model, together, tokenizer)
    for row, (sentence, language) in enumerate(itertools.product(DATA, LANGUAGES)):
        one = own.encoded([sentence], [language], tokenizer)
        with ck.route(model, one.names):
            assert own.translations(model, one, tokenizer) == texts[row : row + 1]


def test_batches_hold_each_sentence_once() -> None:
    own = module("ciat_model")
    data = [{"en": "x" * (number % 7), "de": str(number)} for number in range(50)]
    found = [sentence["de"] for group in itertools.islice(own.batches(data, 4, seed=0), 13) for sentence in group]
    assert sorted(found, key=int) == [str(number) for number in range(50)]


def test_texts_lose_what_is_no_language() -> None:
    plain = module("catalogues").plain
    assert plain("Save _As...") == "save as"
    assert plain("&Datei\N{NO-BREAK SPACE}:") == "datei"
    assert plain("Copy & paste…") == "copy & paste"


def test_a_version_with_an_epoch_is_found(tmp_path: Path) -> None:
    (tmp_path / "thing_1%3a2.0_all.deb").write_bytes(b"numbers")
    with pytest.raises(package_data.UnavailableError, match=r"thing_1%3a2\.0_all\.deb has the SHA-256 .* expected"):
        package_data.debian_folder(("thing", "1:2.0", "00"), tmp_path)


@pytest.mark.parametrize("results", [RESULTS, RESULTS / "again"], ids=["first", "again"])
def test_the_readme_states_the_committed_results(results: Path) -> None:
    document = json.loads((results / "translation.json").read_text(encoding="utf-8"))
    table = module("ciat_report").table(document)
    assert (results / "translation.md").read_text(encoding="utf-8") == table + "\n"
    assert table in (FOLDER / "README.md").read_text(encoding="utf-8")
    seeds = document["settings"]["seeds"]
    assert {len(runs) for runs in document["ways"].values()} == {1, seeds}


@pytest.mark.slow
def test_the_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu")
    run, catalogues = module("run_ciat"), module("catalogues")
    if run.main(["--quick", "--cache", str(CACHE), "--out", str(tmp_path)]):
        pytest.skip(capsys.readouterr().err)
    document = json.loads((tmp_path / "translation.json").read_text(encoding="utf-8"))
    assert list(document["ways"]) == [run.FIRST, *run.WAYS]
    for (done,) in document["ways"].values():
        assert list(done["chrf"]) == ["en_de", "en_es", "en_ru", "en_sv"]
    train, test = catalogues.sentences(run.LANGUAGES, CACHE)
    assert len(train) > 1500 and len(test) > 100
    assert not {own["en"] for own in train} & {own["en"] for own in test}
    assert all(set(own) == {"en", *run.LANGUAGES} for own in (*train, *test))
