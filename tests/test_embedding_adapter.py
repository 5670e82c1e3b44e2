"""Adapters of the embeddings (CIAT): in float64 against plain statements, files, routes, errors."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CROSS_ATTENTION, FAMILIES, build, inputs, output
from plain_ciat import beside, change, of_embeddings, plain_t5
from torch import Tensor, nn

import compacter_kernels as ck
from compacter_kernels.inject.embedding_adapters import EmbeddingAdapters

CIAT = ck.CompacterConfig(
    embedding_adapter=True, is_parallel=True, non_linearity="relu", reduction_factor=2, phm_init_range=1.0,
    train_layer_norms=False, modules_to_save=[],
)  # fmt: skip
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def holders(model: nn.Module) -> dict[str, EmbeddingAdapters]:
    return {name: part for name, part in model.named_modules() if isinstance(part, EmbeddingAdapters)}


def make(family: str, *names: str, config: ck.CompacterConfig = CIAT, **options: Any) -> nn.Module:
    """A model in float64 with adapters of these names, whose values are all drawn."""
    torch.manual_seed(0)
    model = build(family, **options).double()
    for name in names:
        ck.inject(model, config, name=name)
    with torch.no_grad():
        for _, p in ck.adapter_parameters(model) if names else ():
            p.normal_(std=0.5)
    return model


def plain_gpt2(model: Any) -> Tensor:
    """A decoder with norms before its blocks: x + Sub(LN x) + W2 relu(W1 LN x)."""
    body, tokens = model.transformer, inputs("gpt2")["input_ids"]
    x = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
    x = of_embeddings(body.h[0], x)
    for block in body.h:
        h = block.ln_1(x)
        x = x + block.attn(h)[0] + beside(block.attn.c_proj, h)
        h = block.ln_2(x)
        x = x + block.mlp(h) + beside(block.mlp.c_proj, h)
    return model.lm_head(body.ln_f(x))  # type: ignore[no-any-return]


def plain_bert(model: Any) -> Tensor:
    """An encoder with norms after its blocks: LN(x + Sub(x) + W2 relu(W1 x))."""
    layers, x = model.bert.encoder.layer, model.bert.embeddings(inputs("bert")["input_ids"])
    x = of_embeddings(layers[0], x)
    for layer in layers:
        block = layer.attention.output
        x = block.LayerNorm(block.dense(layer.attention.self(x)[0]) + beside(block.dense, x) + x)
        block = layer.output
        x = block.LayerNorm(block.dense(layer.intermediate(x)) + beside(block.dense, x) + x)
    return model.classifier(model.bert.pooler(x))  # type: ignore[no-any-return]


PLAIN = {"bert": plain_bert, "gpt2": plain_gpt2, "t5": plain_t5}


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_is_the_plain_statement(family: str) -> None:
    options = {"add_cross_attention": False} if family == "gpt2" else {}
    model = make(family, "default", **options)
    given = {"input_ids": inputs(family)["input_ids"]} if family == "gpt2" else inputs(family)
    y = model(**given)[0]
    with ck.disable_adapters(model):
        expected, base = PLAIN[family](model), model(**given)[0]
    torch.testing.assert_close(y, expected, **EXACT)
    assert not torch.allclose(y, base, atol=1e-3)
    parameters = [p for _, p in ck.adapter_parameters(model)]
    for p, (got, wanted) in zip(
        parameters, zip(*(torch.autograd.grad(o.square().sum(), parameters) for o in (y, expected)), strict=True),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted, msg=f"the gradient of {tuple(p.shape)}", rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_of_each_stack_takes_the_changed_embeddings(family: str) -> None:
    model, before, after = build(family).double(), {}, {}
    plain = _double(family, model.requires_grad_(False))
    config = ck.CompacterConfig(**{**CIAT.to_dict(), "is_parallel": False})
    reference = make(family, "default", config=config)
    layers = {name.removesuffix(".compacter"): part for name, part in holders(reference).items()}
    assert len(layers) == (2 if family in {*CROSS_ATTENTION} - {"gpt2"} else 1)
    assert all(name.endswith(".0") for name in layers)
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: before.update({name: args[0]}))
    ck.inject(model, config)
    model.load_state_dict(reference.state_dict())
    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: after.update({name: args[0]}))
    y = _double(family, model)
    for name in layers:
        torch.testing.assert_close(after[name], of_embeddings(model.get_submodule(name), before[name]), **EXACT)
    assert not torch.allclose(y, plain, atol=1e-4)
    y.square().mean().backward()
    assert all(p.grad is not None for part in layers for p in model.get_submodule(part).compacter.parameters())
    ck.remove_adapters(model)
    assert not holders(model) and torch.equal(_double(family, model), plain)


def _double(family: str, model: nn.Module) -> Tensor:
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs(family).items()}
    return model(**given)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", PLAIN)
def test_a_routed_batch_is_its_separate_batches(family: str) -> None:
    model = make(family, "en_de", "en_fr", config=ck.CompacterConfig(**{**CIAT.to_dict(), "train_layer_norms": True}))
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs(family, batch=4).items()}
    names = ["en_fr", None, "en_de", "en_fr"]
    with ck.route(model, names):
        mixed = model(**given)[0]
    for row, name in enumerate(names):
        one = {key: x[row : row + 1] for key, x in given.items()}
        ck.set_adapter(model, name or "en_de")
        if name is None:
            with ck.disable_adapters(model):
                alone = model(**one)[0]
        else:
            alone = model(**one)[0]
        torch.testing.assert_close(mixed[row : row + 1], alone, **EXACT)


@pytest.mark.parametrize("family", PLAIN)
def test_adapters_are_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = make(family, "default")
    ck.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["embedding_adapter"] is True
    again = ck.load_adapter(build(family).double(), tmp_path)
    assert torch.equal(_double(family, again), _double(family, model))
    for p in again.parameters():
        p.data.zero_()
    again = ck.load_adapter(again, tmp_path)  # into the adapters that it has
    saved = dict(ck.adapter_parameters(model))
    assert all(torch.equal(p, saved[name]) for name, p in ck.adapter_parameters(again))
    other = ck.inject(build(family), ck.CompacterConfig(**{**CIAT.to_dict(), "embedding_adapter": False}))
    with pytest.raises(ValueError, match="embedding_adapter is False in the model, True in the file"):
        ck.load_adapter(other, tmp_path)


def test_names_of_an_earlier_file_are_without_the_option() -> None:
    options = CIAT.to_dict()
    del options["embedding_adapter"]
    assert not ck.CompacterConfig.from_dict(options).embedding_adapter


@pytest.mark.parametrize("pickled", [False, True])
def test_copies_are_apart(pickled: bool) -> None:
    model = make("t5", "default")
    other = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
    expected = _double("t5", model)
    assert torch.equal(_double("t5", other), expected)
    for part in holders(other).values():
        for p in part.parameters():
            p.data.zero_()
    assert not torch.equal(_double("t5", other), expected)
    assert torch.equal(_double("t5", model), expected)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_cached_generation_is_uncached_generation(family: str) -> None:
    options = {"add_cross_attention": False} if family == "gpt2" else {}
    model = make(family, "one", "two", **options)
    tokens = {"input_ids": inputs(family, batch=2)["input_ids"]}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    tokens["attention_mask"] = torch.ones_like(tokens["input_ids"])
    with ck.route(model, ["two", "one"]):
        cached, uncached = (model.generate(**tokens, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_compiles_without_a_graph_break(family: str) -> None:
    torch._dynamo.reset()
    model = ck.inject(build(family), CIAT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(family, compiled), output(family, model), rtol=1e-5, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients() -> None:
    gradients = []
    for reentrant in (None, False, True):
        model = make("gpt2", "default", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        _double("gpt2", model).square().mean().backward()
        gradients.append([p.grad for _, p in ck.adapter_parameters(model)])
    for others in gradients[1:]:
        for got, wanted in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(got, wanted, **EXACT)


class Blocks(nn.Module):
    """A model that is not in the table. Its layers take their input by name."""

    def __init__(self, stack: type[nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2)]
        for block in blocks:
            block.forward = lambda x, block=block: x + block["fc"](x)  # type: ignore[method-assign]
        self.words = nn.Embedding(5, 8)
        self.blocks = stack(blocks) if stack is nn.ModuleList else nn.ModuleDict(dict(zip("01", blocks, strict=True)))
        self.head = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for name, block in self.blocks.named_children():
            x = block(x=x) if name != "compacter" else x
        return self.head(x)  # type: ignore[no-any-return]


def by_targets(*ends: str, **options: Any) -> ck.CompacterConfig:
    given = {**CIAT.to_dict(), "target_modules": ends, "phm_dim": 2, **options}
    return ck.CompacterConfig(**given)


def test_any_model_by_target_modules() -> None:
    model, x, config = Blocks().double(), torch.tensor([[1, 2, 3]]), by_targets("fc", is_parallel=False)
    ck.inject(model, config)
    assert list(holders(model)) == ["blocks.0.compacter"]
    with torch.no_grad():
        for _, p in ck.adapter_parameters(model):
            p.normal_(std=0.5)
    h = of_embeddings(model.blocks[0], model.words(x))
    for block in model.blocks:
        with ck.disable_adapters(model):
            y = block["fc"](h)
        h = h + y + change(block["fc"].compacter["default"], y)
    torch.testing.assert_close(model(x), model.head(h), **EXACT)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_of_torch(norm_first: bool) -> None:
    """In eval mode without gradients, its fast path would pass over adapters of layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    other = copy.deepcopy(model)
    ck.inject(model, by_targets("self_attn", "linear2", is_parallel=False))
    ck.inject(other, by_targets("self_attn", "linear2", is_parallel=False, embedding_adapter=False))
    with torch.no_grad():
        for _, p in ck.adapter_parameters(model):
            p.normal_(std=0.5)
        own = {name: p for name, p in model.state_dict().items() if ".layers.0.compacter" not in f".{name}"}
        other.load_state_dict(own)
        x = torch.randn(2, 3, 8, dtype=torch.float64)
        torch.testing.assert_close(model(x), other(of_embeddings(model.layers[0], x)), **EXACT)
        with ck.disable_adapters(model), ck.disable_adapters(other):
            torch.testing.assert_close(model(x), other(x), **EXACT)


def test_sizes_dtypes_and_layers_left_out() -> None:
    config = by_targets(reduction_factor={"0": 4, "1": 2, "default": 8}, leave_out=[0, 2, 3], target_modules=None)
    model = ck.inject(build("t5").bfloat16(), config)
    assert list(holders(model)) == ["encoder.block.0.compacter"]
    adapter = holders(model)["encoder.block.0.compacter"]["default"]
    assert adapter.bottleneck == 16 and adapter.down.W_left.dtype == torch.bfloat16
    assert output("t5", model).dtype == torch.bfloat16
    ck.inject(model, by_targets(target_modules=None, dtype="float32", scaling="learned"), name="wide")
    assert holders(model)["decoder.block.0.compacter"]["wide"].norm_before.weight.dtype == torch.float32
    assert output("t5", model).dtype == torch.bfloat16


REFUSED = {
    "no list of layers": (lambda: Blocks(nn.ModuleDict), ("fc",), r"needs a list of layers.*blocks.0.fc is no part"),
    "no layers": (Blocks, ("head",), "needs a list of layers.*head is no part"),
    "an adapted first layer": (Blocks, ("blocks.0", "fc"), r"needs a list of layers.*blocks\.0 is no part"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_change_nothing(name: str) -> None:
    make_model, ends, message = REFUSED[name]
    model = make_model()
    before = [key for key, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        ck.inject(model, by_targets(*ends))
    assert before == [key for key, _ in model.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_first_layer_with_an_adapter_behind_it_is_refused() -> None:
    model = Blocks()
    model.config = SimpleNamespace(hidden_size=8)  # type: ignore[assignment]
    ck.inject(model, by_targets("fc"), name="embeddings")
    with pytest.raises(ValueError, match=r"blocks\.0 would have an adapter of its output and an embedding adapter"):
        ck.inject(model, by_targets("blocks.0", embedding_adapter=False), name="layers")


def test_tokens_are_no_hidden_states() -> None:
    model = nn.Sequential(nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)))
    ck.inject(model, by_targets("0.1"))
    with pytest.raises(TypeError, match=r"takes hidden states; a Sequential got torch.int64"):
        model(torch.tensor([[1, 2]]))


def test_embedding_adapters_are_not_mixed() -> None:
    model = make("bert", "one", "two")
    with ck.mix(model, ["one", "two"], torch.ones(2)), pytest.raises(ValueError, match="those of embeddings have one"):
        output("bert", model)


def test_no_other_library_has_them(tmp_path: Path) -> None:
    ck.save_adapter(make("bert", "default"), tmp_path)
    with pytest.raises(ValueError, match="embedding_adapter=True cannot be converted"):
        ck.convert(tmp_path, "adapters", model_type="bert")
    ckp = pytest.importorskip("compacter_kernels.peft")
    with pytest.raises(ValueError, match="embedding_adapter=True: peft has adapters of layers only"):
        ckp.CompacterConfig(embedding_adapter=True)
