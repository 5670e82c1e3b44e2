"""The example of a compressed attention network, in float64 against its equation."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from example_folders import first_on_path
from torch import Tensor, nn

import compacter_kernels as ck

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "compressed_attention"
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WORDS, LENGTH = 11, 7
CONFIG = ck.CompacterConfig(target_modules=["output", "linear2"], reduction_factor=4, phm_init_range=1.0)

_path = first_on_path(FOLDER)


def module(name: str) -> Any:
    return importlib.import_module(name)


def host(*adapters: str) -> Any:
    """A small model in float64 with random biases, and with adapters of these names."""
    torch.manual_seed(0)
    model = module("can_model").EncoderDecoder(WORDS, LENGTH, hidden=16, inner=32, heads=2).double().eval()
    for layer in model.decoder.layers:
        nn.init.normal_(layer.bias)
    for name in adapters:
        ck.inject(model, CONFIG, name=name)
    return model


def rows(count: int = 4) -> tuple[Tensor, Tensor]:
    """A source, and tokens of another length."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(WORDS, (count, n), generator=generator) for n in (LENGTH - 2, LENGTH))  # type: ignore[return-value]


def sublayer(layer: Any, x: Tensor, enc: Tensor) -> Tensor:
    """The equation of the README for one sequence x (T, d), token by token and head by head."""
    d, width, heads = x.shape[1], layer.output.in_features, layer.heads
    wk_e, wv_e = layer.source.weight.split([d, width])
    wq, wk_s, wv_s, wr = layer.state.weight.split([d, d, width, width])
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    y = (x - mean) / (variance + layer.norm.eps).sqrt() * layer.norm.weight + layer.norm.bias
    out = []
    for t in range(len(x)):
        K = torch.cat([enc @ wk_e.T, y[: t + 1] @ wk_s.T])
        V = torch.cat([enc @ wv_e.T, y[: t + 1] @ wv_s.T])
        q, parts = wq @ y[t], []
        for h in range(heads):
            of_k, of_v = (slice(h * n // heads, (h + 1) * n // heads) for n in (d, width))
            parts.append(torch.softmax(K[:, of_k] @ q[of_k] / math.sqrt(d // heads), 0) @ V[:, of_v])
        out.append(x[t] + layer.output.weight @ torch.relu(torch.cat(parts) + wr @ y[t] + layer.bias))
    return torch.stack(out)


def test_a_layer_is_its_equation() -> None:
    layer = host().decoder.layers[0]
    x, enc = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 4, 16, dtype=torch.float64)
    expected = torch.stack([sublayer(layer, *each) for each in zip(x, enc, strict=True)])
    torch.testing.assert_close(layer(x, layer.start(enc, 0)), expected, **EXACT)


def test_the_standard_layer_is_torch_s() -> None:
    """So the two decoders whose times are compared compute what they say."""
    torch.manual_seed(0)
    layer = module("can_model").StandardLayer(16, 32, 2).double()
    theirs = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True).double()
    names = {"self_norm": "norm1", "cross_norm": "norm2", "feed_norm": "norm3", "self_output": "self_attn.out_proj",
             "cross_output": "multihead_attn.out_proj", "first": "linear1", "second": "linear2"}  # fmt: skip
    state = {f"{other}.{end}": getattr(getattr(layer, own), end) for own, other in names.items() for end in
             ("weight", "bias")}  # fmt: skip
    for end in ("weight", "bias"):
        state[f"self_attn.in_proj_{end}"] = getattr(layer.qkv, end)
        state[f"multihead_attn.in_proj_{end}"] = torch.cat([getattr(layer.q, end), getattr(layer.kv, end)])
    theirs.load_state_dict(state)
    x, enc = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 4, 16, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(x, layer.start(enc, 0)), theirs(x, enc, tgt_mask=mask), **EXACT)


@pytest.mark.parametrize("adapters", [(), ("one",)], ids=["plain", "adapted"])
@pytest.mark.parametrize("layer", ["CompressedLayer", "StandardLayer"])
def test_cached_decoding_is_uncached_decoding(layer: str, adapters: tuple[str, ...]) -> None:
    model, (source, tokens) = host(), rows()
    sizes = {"hidden": 16, "inner": 32, "heads": 2, "layers": 2}
    decoder = module("can_model").Decoder(getattr(module("can_model"), layer), WORDS, LENGTH, **sizes).double()
    ends = ["output" if layer == "CompressedLayer" else "second"]
    config = ck.CompacterConfig(target_modules=ends, reduction_factor=4, phm_init_range=1.0)
    for name in adapters:
        ck.inject(decoder, config, name=name)
    with torch.no_grad():
        enc = model.encode(source)
        seen = decoder.start(enc, LENGTH)
        parts = [decoder(part, seen, first) for first, part in ((0, tokens[:, :3]), (3, tokens[:, 3:4]))]
        parts += [decoder(tokens[:, i : i + 1], seen, i) for i in range(4, LENGTH)]
        torch.testing.assert_close(torch.cat(parts, 1), decoder(tokens, decoder.start(enc)), **EXACT)


def test_generating_with_routed_adapters_is_the_same_with_and_without_a_cache() -> None:
    model, (source, _) = host("one", "two"), rows()
    with ck.route(model, ["one", None, "two", "one"]):
        tokens, scores = model.generate(source, LENGTH)
        other_tokens, other = model.generate(source, LENGTH, cached=False)
        torch.testing.assert_close(scores, other, **EXACT)
        assert torch.equal(tokens, other_tokens)
        before = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
        torch.testing.assert_close(model(source, before), scores, **EXACT)


def test_a_routed_batch_is_its_separate_batches() -> None:
    model, (source, tokens) = host("one", "two"), rows()
    names = ["two", None, "one", "two"]
    with ck.route(model, names):
        mixed = model(source, tokens)
    for row, name in enumerate(names):
        ck.set_adapter(model, name or "one")
        one = slice(row, row + 1)
        if name is None:
            with ck.disable_adapters(model):
                alone = model(source[one], tokens[one])
        else:
            alone = model(source[one], tokens[one])
        torch.testing.assert_close(mixed[one], alone, **EXACT)
    assert not torch.allclose(mixed[0], mixed[3])


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    plain = host()
    model, inputs = ck.inject(copy.deepcopy(plain), CONFIG, name="one"), rows()
    assert sum(isinstance(part, ck.CompacterAdapter) for part in model.modules()) == 4
    ck.save_adapter(model, tmp_path)
    before = plain(*inputs)
    other = ck.load_adapter(plain, tmp_path)
    assert torch.equal(other(*inputs), model(*inputs)) and not torch.allclose(other(*inputs), before, atol=1e-4)


def test_adapters_learn_another_task_and_the_base_stays() -> None:
    task = module("can_task")
    base = task.base(seed=0, steps=80)
    model = copy.deepcopy(base)
    losses = task.add_adapter(model, "next", seed=0, steps=80)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    kept = model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in base.state_dict().items())
    source = task.letters(4, seed=5)
    with ck.disable_adapters(model):
        assert torch.equal(model.generate(source, task.LENGTH)[1], base.generate(source, task.LENGTH)[1])


@pytest.mark.slow
def test_the_short_form_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module("run_can")
    monkeypatch.setattr(run, "QUICK", {"seeds": 2, "steps": 3, "rounds": 1, "batches": [1]})
    monkeypatch.setattr("sys.argv", ["run_can.py", "--quick", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    run.main()
    torch.set_num_threads(threads)
    document = json.loads((tmp_path / "compressed_attention.json").read_text(encoding="utf-8"))
    assert len(document["runs"]) == 2
    for result in document["runs"]:
        assert result["differences"]["loaded"] == 0
        assert max(result["differences"].values()) < 1e-4
    assert [row["batch"] for row in document["speed"]["rows"]] == [1]


def test_the_committed_table_is_that_of_its_json() -> None:
    folder = ROOT / "benchmarks" / "results" / "zen4-2core"
    document = json.loads((folder / "compressed_attention.json").read_text(encoding="utf-8"))
    written = (folder / "compressed_attention.txt").read_text(encoding="utf-8")
    assert module("can_report").table(document) == written
