"""The formats of the authors, T-Few, OpenDelta and HyperNets, against models written here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WIDTH, build, output
from test_save_load import trained
from torch import Tensor, nn
from torch.nn import functional as F

import compacter_kernels as ck
from compacter_kernels.checkpoints.convert import convert
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

safetensors = pytest.importorskip("safetensors.torch")
N, BOTTLENECK = 4, 8
ACTIVATIONS = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class Projection(nn.Module):
    """A PHM layer with the names of those libraries, computed by torch.kron."""

    def __init__(self, wide: int, out: int, rule: dict[str, nn.Parameter] | None, factorised: bool) -> None:
        super().__init__()
        new = {"phm_rule": nn.Parameter(torch.randn(N, N, N))}
        for name, parameter in (new if rule is None else rule).items():
            self.register_parameter(name, parameter)
        if factorised:
            self.W_left = nn.Parameter(torch.randn(N, wide // N, 2))
            self.W_right = nn.Parameter(torch.randn(N, 2, out // N))
        else:
            self.W = nn.Parameter(torch.randn(N, wide // N, out // N))
        self.b = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        W = self.W_left @ self.W_right if hasattr(self, "W_left") else self.W
        rule = self.phm_rule if hasattr(self, "phm_rule") else self.phm_rule_left @ self.phm_rule_right
        return x @ sum(torch.kron(a, w) for a, w in zip(rule, W, strict=True)) + self.b


class Adapter(nn.Module):
    def __init__(self, non_linearity: str, rule: Any = None, factorised: bool = True) -> None:
        super().__init__()
        self.down_sampler = Projection(WIDTH, BOTTLENECK, rule, factorised)
        self.up_sampler = Projection(BOTTLENECK, WIDTH, rule, factorised)
        self.non_linearity = non_linearity

    def forward(self, x: Tensor) -> Tensor:
        return self.up_sampler(ACTIVATIONS[self.non_linearity](self.down_sampler(x)))


class Controller(nn.Module):
    """The authors' AdapterController for one or several tasks."""

    def __init__(self, tasks: list[str], norms: bool, **options: Any) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({task: Adapter("gelu_new", **options) for task in tasks})
        if norms:
            self.pre_layer_norm, self.post_layer_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre_layer_norm(x) if hasattr(self, "pre_layer_norm") else x
        y = self.adapters["mrpc"](h)
        return (self.post_layer_norm(y) if hasattr(self, "post_layer_norm") else y) + x


def _hook(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    def after(_: nn.Module, __: Any, y: Any) -> Any:
        return (function(y[0]), *y[1:]) if isinstance(y, tuple) else function(y)

    module.register_forward_hook(after)


def _blocks(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the layers of a T5 that get an adapter, each with the module that it follows."""
    layers = [m for name, m in model.named_modules() if re.fullmatch(r".*block\.\d+\.layer\.\d", name)]
    parts = [
        (layer, getattr(layer, "SelfAttention", None) or getattr(layer, "DenseReluDense", None)) for layer in layers
    ]
    return [(layer, part) for layer, part in parts if part is not None]


def _scale(model: nn.Module) -> nn.Module:
    """Make the logits of order one, and change the layer norms as a training would."""
    for name, parameter in model.named_parameters():
        if name.endswith(("W_left", "W_right", ".W", ".b")):
            parameter.data.mul_(0.3)
        if "norm" in name:
            parameter.data.normal_(1.0, 0.1)
    return model.requires_grad_(False).eval()


def original(shared: bool = True, norms: bool = False, tasks: tuple[str, ...] = ("mrpc",), **options: Any) -> nn.Module:
    model = build("t5")
    if shared and options.pop("factorised_rule", False):
        model.phm_rule_left = nn.Parameter(torch.randn(N, N, 1))
        model.phm_rule_right = nn.Parameter(torch.randn(N, 1, N))
        options["rule"] = {"phm_rule_left": model.phm_rule_left, "phm_rule_right": model.phm_rule_right}
    elif shared:
        model.phm_rule = nn.Parameter(torch.randn(N, N, N))
        options["rule"] = {"phm_rule": model.phm_rule}
    for layer, part in _blocks(model):
        layer.adapter_controller = Controller(list(tasks), norms, **options)
        _hook(part, layer.adapter_controller)
    return _scale(model)


def t_few(cross: bool = False) -> nn.Module:
    model = build("t5")
    for layer, part in _blocks(model):
        layer.adapter = Adapter("relu")
        _hook(part, lambda x, adapter=layer.adapter: adapter(x) + x)
    for name, layer in model.named_modules():
        if cross and re.fullmatch(r"decoder\.block\.\d+\.layer\.1", name):
            layer.adapter = Adapter("relu")
            _hook(layer.EncDecAttention, lambda x, adapter=layer.adapter: adapter(x) + x)
    return _scale(model)


def opendelta(family: str, ends: tuple[str, ...]) -> nn.Module:
    model = build(family)
    for name, module in list(model.named_modules()):
        if name.endswith(ends):
            module.compactor = Adapter("gelu_new")
            _hook(module, lambda x, adapter=module.compactor: adapter(x) + x)
    return _scale(model)


T5_ENDS, BERT_ENDS = ("SelfAttention.o", "DenseReluDense.wo"), ("output.dense",)
SOURCES: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "original": ("original", "t5", original),
    "original, a rule each": ("original", "t5", lambda: original(shared=False)),
    "original, factorised rule": ("original", "t5", lambda: original(factorised_rule=True)),
    "original, W whole": ("original", "t5", lambda: original(factorised=False)),
    "original, norms": ("original", "t5", lambda: original(norms=True)),
    "t-few": ("t-few", "t5", t_few),
    "t-few, cross-attention": ("t-few", "t5", lambda: t_few(cross=True)),
    "opendelta": ("opendelta", "t5", lambda: opendelta("t5", T5_ENDS)),
    "opendelta, whole blocks": ("opendelta", "t5", lambda: opendelta("t5", ("SelfAttention", "DenseReluDense"))),
    "opendelta, bert": ("opendelta", "bert", lambda: opendelta("bert", BERT_ENDS)),
    "opendelta, some layers": ("opendelta", "bert", lambda: opendelta("bert", ("layer.1.output.dense",))),
}


@pytest.mark.parametrize("form", ["model", "state dict", "file"])
@pytest.mark.parametrize("case", SOURCES)
def test_into_ours(case: str, form: str, tmp_path: Path) -> None:
    """A plain model with the converted adapters gives the same logits."""
    kind, family, make = SOURCES[case]
    model = make()
    expected = output(family, model)
    source: Any = model if form == "model" else model.state_dict()
    if form == "file":
        safetensors.save_file({k: t.clone() for k, t in source.items()}, tmp_path / "model.safetensors")
        source = tmp_path / "model.safetensors"
    converted = convert(source, "compacter-kernels", tmp_path / "ours")
    assert converted.source_format == kind
    plain = build(family)
    assert (output(family, plain) - expected).abs().max() > 5e-4
    load_adapter(plain, tmp_path / "ours")
    torch.testing.assert_close(output(family, plain), expected, rtol=1e-5, atol=1e-5)
    config = plain.compacter.configs["default"]
    assert (config.target_modules is None) == (case not in ("opendelta, some layers", "opendelta, whole blocks"))
    assert config.shared_phm_rule == case.startswith(("original",)) - (case == "original, a rule each")
    assert any("activation" in note for note in converted.notes) == (form != "model")


@pytest.mark.parametrize(("kind", "make"), [("original", original), ("t-few", t_few)], ids=["original", "t-few"])
def test_back(kind: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Our folder is converted, and loaded by load_state_dict into a model of their structure."""
    non_linearity = "gelu_new" if kind == "original" else "relu"
    model = trained(build("t5"), phm_rank=2, non_linearity=non_linearity)
    save_adapter(model, tmp_path / "ours")
    converted = convert(tmp_path / "ours", kind, tmp_path / "model.safetensors", name="mrpc")
    again = make()
    again.load_state_dict(build("t5").state_dict(), strict=False)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    wrong = again.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys
    adapters = {key for key in wrong.missing_keys if "adapter" in key or "phm_rule" in key or "norm" in key}
    assert not adapters
    torch.testing.assert_close(output("t5", again), output("t5", model), rtol=1e-5, atol=1e-5)
    assert any(f"build the model with '{non_linearity}'" in note for note in converted.notes)
    assert any("repeated" in note for note in converted.notes) == (kind == "t-few")


def test_back_into_opendelta(tmp_path: Path) -> None:
    model = trained(build("bert"), phm_rank=2)
    converted = convert(model, "opendelta", tmp_path / "model.safetensors")
    assert any("put `bert.`" in note for note in converted.notes)
    again = opendelta("bert", BERT_ENDS)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    state = {key if key.startswith("classifier") else f"bert.{key}": tensor for key, tensor in state.items()}
    again.load_state_dict(build("bert").state_dict(), strict=False)
    assert not again.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(output("bert", again), output("bert", model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["original", "t-few", "opendelta"])
@pytest.mark.parametrize("options", [{}, {"shared_W_phm": True}, {"factorized_phm_rule": True}, {"phm_bias": False}])
def test_ours_there_and_back(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The tensors are the same bit by bit, and shared weights are shared again."""
    model = trained(build("t5"), **options)
    save_adapter(model, tmp_path / "ours")
    convert(model, kind, tmp_path / "theirs.safetensors")
    converted = convert(
        tmp_path / "theirs.safetensors", "compacter-kernels", tmp_path / "back", non_linearity="gelu_new"
    )
    expected = safetensors.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    if options != {"phm_bias": False} or kind == "opendelta":
        assert converted.tensors.keys() == expected.keys()
    assert all(torch.equal(converted.tensors[key], tensor) for key, tensor in expected.items())
    again = load_adapter(build("t5"), tmp_path / "back")
    torch.testing.assert_close(output("t5", again), output("t5", model), rtol=1e-6, atol=1e-6)


WRONG: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "scale": (lambda: trained(build("t5"), scaling=0.5), {"target_format": "t-few"}, "scaling=0.5: adapters of"),
    "norm": (lambda: trained(build("t5"), ln_after=True), {"target_format": "t-few"}, "ln_after=True"),
    "parallel": (lambda: trained(build("t5"), is_parallel=True), {"target_format": "original"}, "is_parallel=True"),
    "cross": (lambda: trained(build("t5"), cross_adapter=True), {"target_format": "original"}, "cross_adapter=True"),
    "no T5": (
        lambda: trained(build("gpt2")),
        {"target_format": "original"},
        "is for T5 alone, .* after h.0.attn.c_proj",
    ),
    "tasks": (lambda: original(tasks=("mrpc", "cola")), {}, "adapters of 2 tasks; give name=, one of cola, mrpc"),
    "no task": (original, {"name": "rte"}, "no adapters of the task 'rte'; there are mrpc"),
    "nothing": (lambda: build("t5"), {}, "fit no format"),
    "no T5 layer": (
        lambda: {"encoder.layer.0.adapter.down_sampler.W": torch.ones(1)},
        {},
        "encoder.layer.0 is no layer",
    ),
    "integers": (
        lambda: {key: t.long() for key, t in original().state_dict().items()},
        {},
        "is torch.int64, not float32 or bfloat16",
    ),
    "lacks W": (lambda: {"encoder.block.0.layer.0.adapter.down_sampler.b": torch.ones(8)}, {}, "without W_left and W"),
    "nested": (lambda: {"state_dict": {}}, {}, "must map names to tensors; 'state_dict' is none"),
    "list": (lambda: [1], {}, "source must be a path, a mapping of tensors or a module, got list"),
    "format": (
        original,
        {"target_format": "lora"},
        "target_format='lora' is not known; choose one of compacter-kernels",
    ),
    "other": (original, {"source_format": "t-few"}, "no adapters of the format 't-few'"),
    "activation": (original, {"non_linearity": "relu"}, "non_linearity='relu', but the source says 'gelu_new'"),
    "layers": (original, {"target_format": "phm_linear"}, "layers, without what makes them an adapter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str, tmp_path: Path) -> None:
    make, options, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        convert(make(), **{"target_format": "compacter-kernels", "target": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_files(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="is a pickle, which can run code"):
            convert(source, "compacter-kernels")
    with pytest.raises(FileNotFoundError, match="is not there"):
        convert(tmp_path / "x", "compacter-kernels")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        convert(tmp_path / "empty", "compacter-kernels")
    for name in ("a", "b"):
        safetensors.save_file({"x": torch.ones(1)}, tmp_path / "empty" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 checkpoints; give one of them: a\.safetensors, b\.safetensors"):
        convert(tmp_path / "empty", "compacter-kernels")
    with pytest.raises(ValueError, match=r"is one file; give a name in \.safetensors"):
        convert(original(), "original", tmp_path / "out")
    for kind in ("compacter-kernels", "adapters"):
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            convert({"encoder.layer.0.output.adapters.x.adapter_up.b": torch.ones(1)}, "original", source_format=kind)


def test_the_config_of_opendelta(tmp_path: Path) -> None:
    model = opendelta("bert", BERT_ENDS)
    safetensors.save_file({k: t.clone() for k, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"delta_type": "compacter", "non_linearity": "relu", "learn_phm": false}')
    config = convert(tmp_path, "compacter-kernels").config
    assert config["non_linearity"] == "relu" and config["learn_phm"] is False


def test_a_rule_that_stands_at_the_root_alone_or_is_given(tmp_path: Path) -> None:
    model = original()
    state = {key: t for key, t in model.state_dict().items() if not re.search(r"sampler\.phm_rule", key)}
    convert(state, "compacter-kernels", tmp_path / "a")
    rule = state.pop("phm_rule")
    with pytest.raises(ValueError, match=r"phm_rule of .* is missing"):
        convert(state, "compacter-kernels", tmp_path / "b")
    convert(state, "compacter-kernels", tmp_path / "b", phm_rule=rule)
    for name in ("a", "b"):
        close = load_adapter(build("t5"), tmp_path / name)
        torch.testing.assert_close(output("t5", close), output("t5", model), rtol=1e-5, atol=1e-5)


def hypernets(x: Tensor, a: Tensor, s: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, sum(torch.kron(a_i, s_i) for a_i, s_i in zip(a, s, strict=True)), bias)


def test_hypernets_layers(tmp_path: Path) -> None:
    layer = {"fc.a": torch.randn(4, 4, 4), "fc.s": torch.randn(4, 6, 3), "fc.bias": torch.randn(24)}
    converted = convert(layer, "phm_linear", tmp_path / "layers.safetensors")
    assert converted.source_format == "hypernets"
    ours = nn.ModuleDict({"fc": ck.PHMLinear(12, 24, phm_dim=4, factorized_phm_W=False)})
    ours.load_state_dict(safetensors.load_file(tmp_path / "layers.safetensors"))
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours["fc"](x), hypernets(x, *layer.values()), rtol=1e-5, atol=1e-5)
    back = convert(tmp_path / "layers.safetensors", "hypernets").tensors
    assert back.keys() == layer.keys() and all(torch.equal(back[key], layer[key]) for key in layer)


@pytest.mark.parametrize("options", [{}, {"factorized_phm_rule": True}, {"factorized_phm_W": False}])
def test_hypernets_of_our_layers(options: dict[str, Any]) -> None:
    layer = ck.PHMLinear(12, 24, phm_rank=2, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 12)
    tensors = convert(layer, "hypernets").tensors
    torch.testing.assert_close(
        hypernets(x, tensors["a"], tensors["s"], tensors["bias"]), layer(x), rtol=1e-5, atol=1e-5
    )


def test_hypernets_of_adapters() -> None:
    model = trained(build("t5"))
    with pytest.raises(ValueError, match="HyperNets has layers, not adapters"):
        convert(model, "hypernets")
    tensors = convert(model, "hypernets", allow_loss=True).tensors
    target = "encoder.block.0.layer.1.DenseReluDense.wo"
    adapter = model.get_submodule(f"{target}.compacter.default")
    x = torch.randn(5, WIDTH)
    layer = [tensors[f"{target}.down.{name}"] for name in ("a", "s", "bias")]
    torch.testing.assert_close(hypernets(x, *layer), adapter.down(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"a": torch.ones(4, 4, 4)}, "a and s must be"),
        ({"a": torch.ones(4, 4, 3), "s": torch.ones(4, 2, 2)}, r"got \(4, 4, 3\) and \(4, 2, 2\)"),
        (
            {"a": torch.ones(4, 4, 4), "s": torch.ones(4, 2, 2), "bias": torch.ones(3)},
            r"bias must be \(8,\), got \(3,\)",
        ),
        ({"s": torch.ones(4, 2, 2)}, "no layers with a and s"),
    ],
)
def test_wrong_layers_of_hypernets(layer: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(layer, "phm_linear")
