"""The example examples/speech_translation, on a tiny Whisper with random weights in float64."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from example_folders import first_on_path
from families import WORDS, build
from torch import Tensor

import compacter_kernels as ck

BaseModelOutput = pytest.importorskip("transformers").modeling_outputs.BaseModelOutput
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "speech_translation"
RESULTS = ROOT / "benchmarks" / "results" / "speech_translation"
EXACT = {"rtol": 1e-12, "atol": 1e-12}
LANGUAGES = ["es", "fr", "it", "ru"]
NAMES = ["es", None, "fr", "es", "ru", "shared"]  # the adapters of a batch
ASKED = ["es", "fr", "fr", "es", "ru", "it"]  # its languages

_path = first_on_path(FOLDER)


def module(name: str = "translation") -> Any:
    return importlib.import_module(name)


@pytest.fixture
def host() -> Any:
    """Adapters of all languages, of which each does something else."""
    model = build("whisper", init_std=0.5).double().requires_grad_(False)
    module("whisper_base").speaks(model, {name: 40 + k for k, name in enumerate(LANGUAGES)}, 45, 46)
    module().add_adapters(model, ["shared", *LANGUAGES], seed=0, phm_init_range=1.0)
    return model


def states(count: int = len(NAMES)) -> Tensor:
    """The encoder's outputs."""
    return torch.randn(count, 20, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def rows(lengths: tuple[int, ...] = (4, 2, 5, 1, 3, 2)) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths]
    return [module().Row(*row) for row in zip(states(), ASKED, tokens, strict=True)]


def alone(name: str | None) -> list[int]:
    return [row for row, other in enumerate(NAMES) if other == name]


def test_an_adapter_is_the_equation(host: Any) -> None:
    """y + W2 relu(W1 LN(y)) for the output y of the feed-forward block, before its residual."""
    layer = host.model.decoder.layers[1].fc2
    x = torch.randn(3, 5, 64, dtype=torch.float64)
    own = dict(layer.compacter["it"].named_parameters())
    (rule,) = (p for name, p in ck.adapter_parameters(host, "it") if name.endswith("phm_rule"))
    w1, w2 = (
        sum(torch.kron(*pair) for pair in zip(rule, own[f"{side}.W_left"] @ own[f"{side}.W_right"], strict=True))
        for side in ("down", "up")
    )
    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * own["norm_before.weight"] + own["norm_before.bias"]
    expected = y + torch.relu(normed @ w1 + own["down.b"]) @ w2 + own["up.b"]
    with ck.route(host, ["it"] * 3):
        torch.testing.assert_close(layer(x), expected, **EXACT)
    assert not torch.allclose(expected, y, atol=1e-2)


def test_a_mixed_batch_has_the_gradients_of_its_separate_batches(host: Any) -> None:
    """The loss is a mean over tokens, so each part counts with its number of tokens."""
    ck.set_adapter(host, ["shared", *LANGUAGES])
    own, words, t = rows(), torch.arange(WORDS), module()
    loss = t.loss_of(host, own, NAMES, words)
    loss.backward()
    mixed = {name: p.grad for name, p in host.named_parameters() if p.grad is not None}
    host.zero_grad()
    tokens = sum(len(row.tokens) + 1 for row in own)
    total = 0.0
    for name in dict.fromkeys(NAMES):
        part = [own[row] for row in alone(name)]
        of_part = t.loss_of(host, part, [name] * len(part), words) * sum(len(row.tokens) + 1 for row in part) / tokens
        total += of_part.item()
        if name is not None:
            of_part.backward()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    separate = {name: p.grad for name, p in host.named_parameters() if p.grad is not None}
    assert mixed.keys() == separate.keys() and not any(".it." in name for name in mixed)
    for name, grad in mixed.items():
        torch.testing.assert_close(grad, separate[name], rtol=1e-10, atol=1e-12)


def test_the_loss_is_the_models_own(host: Any) -> None:
    row, t = rows()[2], module()
    before = t.prefix(host, row.language)
    targets = torch.tensor([*row.tokens, host.config.eos_token_id])
    with ck.route(host, ["it"]):
        ids = torch.tensor([[*before, *row.tokens]])
        logits = host(encoder_outputs=(row.states[None],), decoder_input_ids=ids).logits[0, len(before) - 1 :]
    for words in (torch.arange(WORDS), targets.unique()):
        expected = (logits[:, words].logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).mean()
        torch.testing.assert_close(t.loss_of(host, [row], ["it"], words), expected, **EXACT)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_a_mixed_batch_is_generate_with_its_separate_batches(host: Any, beams: int) -> None:
    options = {"num_beams": beams, "max_new_tokens": 8}
    mixed = module().translate(host, states(), ASKED, NAMES, **options)
    for name in dict.fromkeys(NAMES):
        own = alone(name)
        separate = module().translate(host, states()[own], [ASKED[row] for row in own], [name] * len(own), **options)
        for row, tokens in zip(own, separate, strict=True):
            assert ended(mixed[row], host) == ended(tokens, host)
    base = module().translate(host, states(), ASKED, [None] * len(NAMES), **options)
    assert sum(ended(one, host) != ended(other, host) for one, other in zip(mixed, base, strict=True)) >= 3


def test_generate_has_the_scores_of_one_forward(host: Any) -> None:
    """So keys and values that are kept belong to the adapter of the row."""
    with ck.route(host, NAMES):
        out = host.generate(
            encoder_outputs=BaseModelOutput(states()), language=ASKED, task="transcribe", max_new_tokens=6,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        before = torch.tensor([module().prefix(host, language) for language in ASKED])
        whole = out.sequences if out.sequences.shape[1] > 6 else torch.cat([before, out.sequences], 1)
        logits = host(encoder_outputs=(states(),), decoder_input_ids=whole[:, :-1]).logits[:, before.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits.float(), rtol=1e-6, atol=1e-6)


def ended(tokens: list[int], host: Any) -> list[int]:
    """The tokens up to the end, behind which a batch is padded."""
    end = host.config.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_training_moves_the_adapters_of_the_way_alone(host: Any) -> None:
    before = {name: p.clone() for name, p in host.named_parameters()}
    words = torch.arange(WORDS)
    losses = module().train(host, "per language", rows(), words, seed=0, epochs=8, rate=1e-2, batch=3)
    assert losses[-1] < losses[0]
    moved = {name for name, p in host.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f for language in LANGUAGES for f, _ in ck.adapter_parameters(host, language)}


def test_twice_the_samples_of_the_same_sound() -> None:
    slow, fast = (torch.sin(0.88 * torch.pi * torch.arange(n, dtype=torch.float64) * 1000 / n) for n in (1000, 2000))
    torch.testing.assert_close(module("prompts").resampled(slow), fast, **EXACT)


def test_no_words_of_the_test_part_are_trained() -> None:
    prompts = module("prompts")
    many = [prompts.Prompt(f"prompt-{k}", torch.zeros(1), {"en": f"Words, {k // 3}."}) for k in range(300)]
    parts = prompts.split(many)
    said = {name: {prompts.said(prompt) for prompt in own} for name, own in parts.items()}
    assert said["test"] and said["dev"] and said["train"]
    assert not said["train"] & (said["test"] | said["dev"]) and not said["test"] & said["dev"]
    assert [p.name for own in parts.values() for p in own] != [p.name for p in many]
    assert prompts.split(many) == parts


def test_a_converted_tensor_is_that_of_the_file() -> None:
    """The file in miniature: one matrix of two rows in float16."""
    import struct

    import numpy as np

    values = np.arange(6, dtype="<f2").reshape(2, 3)
    name = b"encoder/weight\0"
    data = struct.pack("<IH5sII", 6, 5, b"Spec\0", 3, 1) + struct.pack(f"<H{len(name)}sB", len(name), name, 2)
    data += struct.pack("<IIBI", 2, 3, 4, values.nbytes) + values.tobytes()
    found = module("whisper_base")._tensors(data)
    assert list(found) == ["encoder/weight"]
    assert torch.equal(found["encoder/weight"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("results", [RESULTS, RESULTS / "again"], ids=["first", "again"])
def test_the_committed_table_is_that_of_its_json(results: Path) -> None:
    document = json.loads((results / "translation.json").read_text(encoding="utf-8"))
    table = module("translation_report").table(document)
    assert (results / "translation.txt").read_text(encoding="utf-8") == table
    for way in ("shared", "per language"):
        assert [run["seed"] for run in document["runs"][way]] == list(range(document["settings"]["seeds"]))


@pytest.mark.slow
def test_the_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu")
    cache = ROOT / "build" / "speech_translation"
    if module("run_translation").main(["--quick", "--cache", str(cache), "--out", str(tmp_path)]):
        pytest.skip(capsys.readouterr().err)
    document = json.loads((tmp_path / "translation.json").read_text(encoding="utf-8"))
    assert document["english"] > 80
    for way in ("shared", "per language"):
        (run,) = document["runs"][way]
        assert run["losses"][-1] < run["losses"][0]
