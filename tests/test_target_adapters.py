"""Adapters behind their targets: several threads, blocks of every kind, exchanged modules."""

from __future__ import annotations

import collections
import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from families import WIDTH, build, output
from torch import Tensor, nn

import compacter_kernels as ck

SMALL: dict[str, Any] = {"reduction_factor": 4, "phm_init_range": 1.0}


def parallel(**options: Any) -> ck.CompacterConfig:
    return ck.CompacterConfig(**SMALL, is_parallel=True, **options)


def test_two_threads_do_not_mix() -> None:
    """Both threads stop between the input and the output of a block.

    So each of them has stored an input at that time.
    """
    model = ck.inject(build("llama"), parallel())
    words = [torch.full((1, 4), word) for word in (5, 9)]
    with torch.no_grad():
        expected = [model(input_ids=x)[0] for x in words]
    both, got = threading.Barrier(2, timeout=60), {}

    def hold(*_: Any) -> None:
        both.wait()

    def run(turn: int) -> None:
        with torch.no_grad():
            got[turn] = model(input_ids=words[turn])[0]

    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(hold)
    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert [torch.equal(got[turn], expected[turn]) for turn in range(2)] == [True, True]


def test_a_model_is_copied_after_a_call_that_was_interrupted() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = ck.inject(build("llama"), parallel())
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        output("llama", model)
    handle.remove()
    assert torch.equal(output("llama", copy.deepcopy(model)), output("llama", model))


@torch.no_grad()
def test_a_block_whose_ends_are_compiled_apart() -> None:
    """The input of the block passes from one graph to the other."""
    model = ck.inject(build("bert"), parallel())
    expected = output("bert", model)
    for layer in model.bert.encoder.layer:
        layer.attention.self.compile(backend="eager")
        layer.attention.output.compile(backend="eager")
    assert torch.equal(output("bert", model), expected)


Pair = collections.namedtuple("Pair", ["hidden", "rest"])
KINDS: dict[str, Any] = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, 1),
    "list": lambda h: [h, 1],
    "named tuple": lambda h: Pair(h, 1),
    "dict": lambda h: {"hidden": h, "rest": 1},
    "ordered": lambda h: collections.OrderedDict(hidden=h, rest=1),
}


class Block(nn.Module):
    """A block that is called by keyword. Its input is not the first argument."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(WIDTH, WIDTH), kind

    def forward(self, hidden: Tensor, mask: Tensor) -> Any:
        return KINDS[self.kind](self.inner(hidden))


class Stack(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.block = Block(kind)
        self.block.out_features = WIDTH

    def forward(self, x: Tensor) -> Any:
        return self.block(mask=torch.zeros_like(x), hidden=x)


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_called_by_keyword_and_every_kind_of_output(kind: str, is_parallel: bool) -> None:
    config = ck.CompacterConfig(**SMALL, target_modules=["block"], is_parallel=is_parallel)
    model = ck.inject(Stack(kind), config)
    adapter = next(m for m in model.modules() if isinstance(m, ck.CompacterAdapter))
    x = torch.randn(3, WIDTH)
    inner = model.block.inner(x)
    expected = KINDS[kind](adapter(x, inner) if is_parallel else adapter(inner))
    got = model(x)
    assert type(got) is type(expected)
    parts = [[v] if isinstance(v, Tensor) else list(v.values() if isinstance(v, dict) else v) for v in (got, expected)]
    assert torch.equal(parts[0][0], parts[1][0]) and parts[0][1:] == parts[1][1:]


def test_outputs_of_transformers_keep_their_type() -> None:
    model = ck.inject(build("bert"), ck.CompacterConfig(**SMALL, target_modules=["bert.encoder"]))
    encoder, x = model.bert.encoder, torch.randn(1, 2, WIDTH)
    adapted = encoder(x, output_hidden_states=True)
    with ck.disable_adapters(model):
        plain = encoder(x, output_hidden_states=True)
    assert type(adapted) is type(plain)
    assert torch.equal(adapted.last_hidden_state, encoder.compacter["default"](plain.last_hidden_state))
    assert torch.equal(adapted.hidden_states[-1], plain.last_hidden_state)


def test_an_output_without_a_tensor_is_an_error_that_names_the_module() -> None:
    model = ck.inject(Stack("tensor"), ck.CompacterConfig(**SMALL, target_modules=["block"]))
    model.block.inner.register_forward_hook(lambda *_: "text")
    with pytest.raises(TypeError, match="Block gave a str"):
        model(torch.ones(2, WIDTH))


def test_whole_blocks_of_transformers_in_parallel() -> None:
    """LLaMA calls its attention by keyword, and the attention returns a tuple."""
    model = ck.inject(build("llama"), parallel(target_modules=["self_attn", "mlp"]))
    output("llama", model).square().mean().backward()
    assert all(p.grad is not None for _, p in ck.adapter_parameters(model))


def test_a_parallel_adapter_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output.dense takes 64 numbers and .*output.dense gives 32.*whole blocks"):
        ck.inject(build("bert"), parallel(target_modules=["output.dense"]))
    with pytest.raises(ValueError, match=r"c_proj takes 128 numbers"):
        ck.inject(build("gpt2"), parallel(target_modules=["mlp.c_proj"]))


def test_adapters_of_two_names_read_two_inputs() -> None:
    """Both are at one layer: one takes the input of its block, the other the input of the layer."""
    model = build("bert")
    end = "attention.output.dense"
    ck.inject(model, parallel(output_adapter=False, train_layer_norms=False), name="block")
    ck.inject(model, parallel(target_modules=[end], train_layer_norms=False), name="layer")
    write = model.bert.encoder.layer[0].attention.output.dense
    x, y = torch.randn(2, 1, 3, WIDTH).unbind()
    with ck.disable_adapters(model):
        plain = write(y)
    assert torch.equal(write(y), write.compacter["layer"](y, plain))
    ck.set_adapter(model, "block")
    model.bert.encoder.layer[0].attention.self.query(x)
    assert torch.equal(write(y), write.compacter["block"](x, plain))
    with pytest.raises(RuntimeError, match="was not called before the Linear that ends its block"):
        write(y)


def test_behind_and_in_a_sequential() -> None:
    """The added modules are among those that an nn.Sequential calls."""
    body = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    body.out_features = WIDTH
    model = nn.Sequential(collections.OrderedDict(head=nn.Linear(WIDTH, WIDTH), body=body))
    x = torch.randn(2, WIDTH)
    plain = model(x)
    ck.inject(model, ck.CompacterConfig(**SMALL, target_modules=["body"], modules_to_save=["head"]))
    assert torch.equal(model(x), body.compacter["default"](plain))
    with ck.disable_adapters(model):
        assert torch.equal(model(x), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_afterwards_says_why_and_quantised_before_works() -> None:
    quantize = torch.ao.quantization.quantize_dynamic
    config = ck.CompacterConfig(**SMALL, modules_to_save=[])
    model = ck.inject(build("bert"), config)
    with pytest.raises(RuntimeError, match=r"quantized.dynamic.*stands in place of .*quantise .* first, then inject"):
        output("bert", quantize(model, {nn.Linear}))
    early = ck.inject(quantize(build("bert"), {nn.Linear}), config)
    for (_, p), (_, trained) in zip(ck.adapter_parameters(early), ck.adapter_parameters(model), strict=True):
        p.data.copy_(trained)
    adapted = output("bert", model.bert)
    with ck.disable_adapters(early):
        away = (output("bert", early.bert) - adapted).abs().max()
    assert (output("bert", early.bert) - adapted).abs().max() < away / 4
    with pytest.raises(ValueError, match="classifier: a Linear of no or of quantised parameters"):
        ck.inject(quantize(build("bert"), {nn.Linear}), ck.CompacterConfig(**SMALL))
