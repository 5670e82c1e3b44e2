"""Files that are wrong, cut off or hostile.

Each is refused with a message, and every bit of the model stays as it was.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, output
from test_save_load import trained
from torch import nn

import compacter_kernels as ck
from compacter_kernels.checkpoints.files import CONFIG, DIGEST, JSON_LIMIT, TENSORS
from compacter_kernels.load import load_adapter
from compacter_kernels.save import save_adapter

safetensors = pytest.importorskip("safetensors.torch")


def state(model: nn.Module) -> dict[str, Any]:
    """The parts of a model that a load could change."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forward": [id(vars(module).get("forward")) for module in model.modules()],
        "trains": [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()},
        "active": getattr(getattr(model, "compacter", None), "active", None),
        "output": output("bert", model),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = state(model)
    for key in before.keys() - {"tensors", "output"}:
        assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (address, tensor) in before["tensors"].items():
        assert after["tensors"][name][0] == address and torch.equal(after["tensors"][name][1], tensor), name
    assert torch.equal(after["output"], before["output"])


Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        content.update(changes)
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return change


def text(content: str | bytes) -> Change:
    return lambda folder: (folder / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Edit the tensors, and remove the digest, so that the check after it is tested."""

    def change(folder: Path) -> None:
        loaded = safetensors.load_file(folder / TENSORS)
        edit(loaded)
        safetensors.save_file(loaded, folder / TENSORS)
        config(**{DIGEST: ...})(folder)

    return change


def raw(edit: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / TENSORS).write_bytes(edit((folder / TENSORS).read_bytes()))


def header(edit: Callable[[str], str]) -> Change:
    def rewrite(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        new = edit(data[8 : 8 + size].decode()).encode()
        return struct.pack("<Q", len(new)) + new + data[8 + size :]

    return raw(rewrite)


def pickled(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / TENSORS).unlink()
        with (folder / name).open("wb") as file:
            pickle.dump({"boom": print}, file)

    return change


RULE = "base_model.model.compacter_shared_phm_rule"
BIAS = "base_model.model.bert.encoder.layer.0.output.dense.compacter_down_b"
CASES: dict[str, tuple[Change, str]] = {
    "a list": (text("[]"), "an object is expected, got list"),
    "a number": (text("3"), "an object is expected, got int"),
    "no JSON": (text("{"), "is not a config"),
    "empty": (text(""), "is not a config"),
    "not UTF-8": (text(b'{"peft_type": "\xff\xfe"}'), "is not a config: 'utf-8' codec"),
    "deep": (text('{"a":' * 60000 + "1" + "}" * 60000), "is not a config: .*recursion"),
    "large": (text("{" + " " * JSON_LIMIT + "}"), "larger than 1048576 bytes"),
    "NaN": (text('{"scaling": NaN}'), "is not a config: NaN"),
    "huge number": (text('{"phm_dim": ' + "9" * 5000 + "}"), "is not a config"),
    "key twice": (text('{"phm_dim": 4, "phm_dim": 2}'), "it has a key twice"),
    "other method": (config(peft_type="LORA"), "peft_type 'LORA', not 'COMPACTER'; compacter-kernels convert reads"),
    "no method": (config(peft_type=...), "peft_type None"),
    "other version": (config(format_version=3), "format_version 3; this compacter_kernels reads 1 and 2"),
    "version true": (config(format_version=True), "format_version True"),
    "unknown option": (config(rank=4), "not an option of CompacterConfig: rank; known are reduction_factor"),
    "option of another type": (config(phm_dim="4"), "phm_dim must be an integer >= 1, got '4'"),
    "option as an object": (config(non_linearity={}), "non_linearity must be a name"),
    "list of lists": (config(leave_out=[[1]]), "leave_out must be numbers of layers"),
    "infinite": (config(scaling=1e999), "is not a config: Infinity"),
    "no such activation": (config(non_linearity="os.system"), "'os.system' is not known"),
    "vast rank": (config(phm_rank=10**12), "shape|cannot be built"),
    "vaster rank": (config(phm_rank=10**40), "cannot be built"),
    "vast bottleneck": (config(reduction_factor=1e-300), "cannot be built"),
    "infinite bottleneck": (config(reduction_factor=5e-324), "cannot be built"),
    "other model": (config(model_type="t5"), "of a model with model_type 't5', this BertFor.* has 'bert'"),
    "other width": (config(hidden_size=64), "hidden_size 64, this BertFor.* has 32"),
    "other depth": (config(num_hidden_layers=12), "num_hidden_layers 12, this BertFor.* has 2"),
    "model of no type": (config(model_type=["bert"]), "model_type"),
    "other rank": (config(phm_rank=2), r"shape \(4, 8, 1\), the model needs \(4, 8, 2\)"),
    "more adapters": (config(cross_adapter=True, mh_adapter=False), "and the model does not"),
    "no such module": (config(target_modules=["../../etc/passwd"]), "no module's name ends with ../../etc"),
    "no such head": (config(modules_to_save=["lm_head"]), "no module's name ends with lm_head"),
    "a head of all": (config(modules_to_save=["encoder"]), "bert.encoder holds .*, which gets an adapter"),
    "lacks one": (tensors(lambda t: t.pop(RULE)), "lacks 1 tensors: compacter_shared_phm_rule"),
    "has one more": (tensors(lambda t: t.update({"../../x": torch.ones(1)})), r"does not, 1 tensors: \.\./\.\./x"),
    "has a base weight": (
        tensors(lambda t: t.update({"encoder.layer.0.output.dense.weight": torch.ones(32, 64)})),
        "does not, 1 tensors: encoder.layer.0.output.dense.weight",
    ),
    "has one twice": (
        tensors(lambda t: t.update({BIAS.replace("bert.", ""): t[BIAS].clone()})),
        "two of its tensors have one name, in the model's base and beside it",
    ),
    "dunder": (tensors(lambda t: t.update({"__class__": torch.ones(1)})), "1 tensors: __class__"),
    "other shape": (tensors(lambda t: t.update({BIAS: torch.ones(9)})), r"down_b has shape \(9,\), the model needs"),
    "broadcastable": (tensors(lambda t: t.update({BIAS: torch.ones(1)})), r"down_b has shape \(1,\), the model needs"),
    "scalar": (tensors(lambda t: t.update({BIAS: torch.ones(())})), r"down_b has shape \(\), the model needs"),
    "integers": (tensors(lambda t: t.update({BIAS: torch.ones(8, dtype=torch.int64)})), "down_b is torch.int64, not"),
    "bools": (tensors(lambda t: t.update({BIAS: torch.ones(8, dtype=torch.bool)})), "down_b is torch.bool, not"),
    "complex": (tensors(lambda t: t.update({BIAS: torch.ones(8, dtype=torch.complex64)})), "down_b is torch.complex64"),
    "float8": (tensors(lambda t: t.update({BIAS: torch.ones(8).to(torch.float8_e4m3fn)})), "down_b is torch.float8"),
    "cut": (raw(lambda data: data[:-1]), "no sound safetensors file"),
    "cut in the header": (raw(lambda data: data[:100]), "no sound safetensors file"),
    "no bytes": (raw(lambda data: b""), "no sound safetensors file"),
    "a byte more": (raw(lambda data: data + b"x"), "no sound safetensors file"),
    "a zip": (raw(lambda data: b"PK\x03\x04" + data[4:]), "no sound safetensors file"),
    "a vast header": (raw(lambda data: struct.pack("<Q", 2**63) + data[8:]), "no sound safetensors file"),
    "header claims more": (header(lambda h: h.replace('"data_offsets":[0,', '"data_offsets":[-1,')), "no sound"),
    "shape claims more": (header(lambda h: h.replace('"shape":[', '"shape":[99999999999,', 1)), "no sound"),
    "overlap": (header(lambda h: h.replace('"data_offsets":[', '"data_offsets":[4,0],"x":[', 1)), "no sound"),
    "deep header": (header(lambda h: '{"a":' * 100000 + "1" + "}" * 100000), "no sound"),
    "header no object": (header(lambda h: "[]" + " " * (len(h) - 2)), "no sound"),
    "a key twice in the header": (
        header(lambda h: h[:-1].rstrip(" }") + '},"' + RULE + '":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        "no sound",
    ),
    "a bit flipped": (raw(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "is not the file that"),
    "no digest": (config(**{DIGEST: 7}), "is not the file that"),
    "only a pickle": (
        pickled("adapter_model.bin"),
        r"adapter_model.bin is a pickle, .*torch.load\('adapter_model.bin'",
    ),
    "only a .pt": (pickled("weights.pt"), "is a pickle"),
}


@pytest.fixture(params=["fresh", "with others", "with these"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = build("bert")
    made.bert.pooler.requires_grad_(False)
    if request.param == "with others":
        trained(made, name="other", seed=3)
    if request.param == "with these":
        trained(made, seed=4)
    return made


@pytest.mark.failure("a file is damaged or hostile")
@pytest.mark.parametrize("case", CASES)
def test_refused_and_unchanged(case: str, model: nn.Module, tmp_path: Path) -> None:
    change, message = CASES[case]
    save_adapter(trained(build("bert")), tmp_path)
    change(tmp_path)
    before = state(model)
    if "default" in getattr(getattr(model, "compacter", None), "configs", ()) and "config" in change.__qualname__:
        message = f"{message}|have other options"
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path)
    assert_unchanged(before, model)
    assert len(str(error.value)) < 1500


def test_no_files(model: nn.Module, tmp_path: Path) -> None:
    before = state(model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, expected in (("empty", "empty has no adapter_config.json"), ("a/b/c", "c is no folder")):
        with pytest.raises(FileNotFoundError, match=expected):
            load_adapter(model, tmp_path / path)
    with pytest.raises(NotADirectoryError, match="file is a file; give the folder"):
        load_adapter(model, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_adapter(model, "../nothing")
    save_adapter(trained(build("bert")), tmp_path / "cut")
    (tmp_path / "cut" / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=r"cut has no adapter_model\.safetensors"):
        load_adapter(model, tmp_path / "cut")
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["a.b", "", "keys", 3])
def test_a_name_that_cannot_be(name: Any, model: nn.Module, tmp_path: Path) -> None:
    save_adapter(trained(build("bert")), tmp_path)
    before = state(model)
    with pytest.raises(ValueError, match="name must be a plain name"):
        load_adapter(model, tmp_path, name=name)
    assert_unchanged(before, model)


def test_a_model_on_meta(tmp_path: Path) -> None:
    """It cannot hold the values, so that loading is an error."""
    save_adapter(trained(build("bert")), tmp_path)
    model = build("bert").to("meta")
    with pytest.raises(ValueError, match="on meta; give the model its weights"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "compacter")


def test_a_second_injection_copies_nothing_of_the_first() -> None:
    model = trained(trained(build("bert"), name="a", ln_before=True), name="b")
    assert not [path for path, _ in model.named_parameters() if path.count("compacter") > 1]


def test_a_module_with_an_adapter_in_it_is_not_trained_whole() -> None:
    model = build("bert")
    before = state(model)
    with pytest.raises(ValueError, match=r"layer\.0\.output holds .*see modules_to_save"):
        ck.inject(model, ck.CompacterConfig(reduction_factor=4, modules_to_save=["layer.0.output"]))
    assert_unchanged(before, model)


@pytest.mark.failure("a file is damaged or hostile")
def test_a_file_of_a_tebibyte(tmp_path: Path) -> None:
    """The sparse file takes no more disk than its header. It is refused without being read."""
    save_adapter(trained(build("bert")), tmp_path)
    size = 1 << 40
    head = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        try:
            file.truncate(8 + len(head) + size)
        except OSError:
            pytest.skip("this file system has no such files")
    model = build("bert")
    before = state(model)
    with pytest.raises(ValueError, match=r"no sound safetensors file|does not fit the model"):
        load_adapter(model, tmp_path)
    assert_unchanged(before, model)


ODD = (None, [], {}, "x", -1, 0, 1e308, True, [None], {"0": -1}, 2**70)


@pytest.mark.failure("a file is damaged or hostile")
@pytest.mark.parametrize("option", [*ck.CompacterConfig().to_dict(), "peft_type", "hidden_size", "model_type"])
def test_any_odd_value_of_an_option(option: str, tmp_path: Path) -> None:
    """A value is either valid or refused by a ValueError.

    There is no other error, and no model is changed in part.
    """
    save_adapter(trained(build("bert")), tmp_path)
    original = (tmp_path / CONFIG).read_text()
    model = build("bert")
    before, refused = state(model), 0
    for value in ODD:
        (tmp_path / CONFIG).write_text(original)
        config(**{option: value})(tmp_path)
        try:
            load_adapter(model, tmp_path)
        except ValueError:
            refused += 1
            assert_unchanged(before, model)
        else:
            model = build("bert")
            before = state(model)
    assert refused > 3
