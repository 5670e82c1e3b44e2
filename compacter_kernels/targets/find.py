"""Which modules of a model get an adapter, and which are trained as they are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from compacter_kernels.config import CompacterConfig
from compacter_kernels.targets.added import Added
from compacter_kernels.targets.architectures import ARCHITECTURES, Architecture, Block
from compacter_kernels.targets.by_name import is_called
from compacter_kernels.targets.wrappers import plain_path

LIKELY = ("o_proj", "out_proj", "c_proj", "wo", "down_proj", "fc2", "dense", "lin2", "out_lin", "output_dense", "o")
HEADS = ("classifier", "pre_classifier", "classification_head", "projector", "score", "qa_outputs")


class Target(NamedTuple):
    """A place for an adapter: the module whose output it takes, the one whose input a parallel one takes, the layer."""

    write: str
    read: str
    layer: int


def model_types(model: nn.Module) -> list[str]:
    """The `config.model_type` of the model and of the models it is composed of."""
    types = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return list(dict.fromkeys(kind for kind in types if isinstance(kind, str)))


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base, with their names: without adapters and copies that it has already."""
    added = None
    for name, module in model.named_modules():  # what a module holds comes right after it
        if isinstance(module, Added):
            added = f"{name}."
        elif added is None or not name.startswith(added):
            yield name, module


def find_targets(model: nn.Module, config: CompacterConfig) -> list[Target]:
    """The places that the config asks for, in the order of the model's modules.

    Raises:
        ValueError: the model is not in the table, or has no such modules; the message lists likely ones.
    """
    found = list(_targets(model, config) if config.target_modules is not None else _of_table(model, config))
    if not found:
        raise ValueError(_nothing_found(model, config))
    kept = [target for target in found if target.layer not in config.leave_out]
    if not kept:
        layers = sorted({target.layer for target in found})
        raise ValueError(f"leave_out={list(config.leave_out)} leaves no layer an adapter; there are {layers}")
    return kept


def block_pattern(architecture: Architecture, names: str) -> re.Pattern[str]:
    """What the full names of such modules match: its groups are the stack of layers, and the layer's number."""
    names = re.escape(names).replace(r"\*", r"\d+").replace(r"\|", "|")
    return re.compile(rf"(?P<stack>(?:.*\.)?(?:{architecture.layers}))\.(?P<layer>\d+)\.(?:{names})")


def _of_table(model: nn.Module, config: CompacterConfig) -> Iterator[Target]:
    wanted = {
        "attention": config.mh_adapter,
        "feed_forward": config.output_adapter,
        "cross_attention": config.cross_adapter,
    }
    kinds = dict.fromkeys(ARCHITECTURES[kind] for kind in model_types(model) if kind in ARCHITECTURES)
    blocks = [(kind, block) for kind in kinds for name in wanted if wanted[name] and (block := getattr(kind, name))]
    patterns = [(kind, block, block_pattern(kind, block.write)) for kind, block in blocks]
    full: dict[str, str] = {}  # by the names without wrappers; of a wrapper and what it wraps, the wrapper's
    for name, _ in base_modules(model):
        full.setdefault(plain_path(model, name), name)
    names = list(full)
    offsets = _offsets(names, list(kinds))
    for name in names:
        for kind, block, pattern in patterns:
            match = pattern.fullmatch(name)
            if match:
                read = _read(names, kind, block, match)
                yield Target(full[name], full[read], offsets[match["stack"]] + int(match["layer"]))
                break


def _read(names: list[str], kind: Architecture, block: Block, write: re.Match[str]) -> str:
    """The module that gets the input of the block that ends in `write`."""
    layer, pattern = f"{write['stack']}.{write['layer']}.", block_pattern(kind, block.read)
    return next(name for name in names if name.startswith(layer) and pattern.fullmatch(name))


def _offsets(names: list[str], kinds: list[Architecture]) -> dict[str, int]:
    """How many layers come before each stack: a decoder's layers count on after the encoder's."""
    sizes: dict[str, int] = {}
    for name in names:
        for kind in kinds:
            match = re.fullmatch(rf"(?P<stack>(?:.*\.)?(?:{kind.layers}))\.(?P<layer>\d+)", name)
            if match:
                sizes[match["stack"]] = int(match["layer"]) + 1
    return dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))


def _targets(model: nn.Module, config: CompacterConfig) -> Iterator[Target]:
    targets = config.target_modules or ()
    names = [name for name, _ in base_modules(model)]
    missing = [target for target in targets if not any(_ends_with(name, target) for name in names)]
    if missing:
        raise ValueError(f"target_modules: no module's name ends with {', '.join(missing)}. {_likely(model)}")
    stacks: dict[str, dict[str, int]] = {}
    for name in names:
        if any(_ends_with(name, target) for target in targets):
            _check_called(model, name, "target_modules")
            stack, layer = (re.match(r"(.*?)\.?(\d+)\.", name) or re.match(r"()(0?)", name)).groups()  # type: ignore[union-attr]
            stacks.setdefault(stack, {})[name] = int(layer or 0)
    offset = 0
    for layers in stacks.values():
        yield from (Target(name, name, offset + layer) for name, layer in layers.items())
        offset += max(layers.values()) + 1


def _check_called(model: nn.Module, name: str, option: str) -> None:
    if not is_called(model, name):
        attention = name.rpartition(".")[0] or type(model).__name__
        raise ValueError(
            f"{option}: {name} is never called, {attention} reads its weights itself; name the attention, "
            f"{attention.rpartition('.')[2]!r}"
        )


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _nothing_found(model: nn.Module, config: CompacterConfig) -> str:
    kinds = model_types(model)
    if any(kind in ARCHITECTURES for kind in kinds):
        return f"a model of type {', '.join(kinds)} has no block of the kind asked for (mh_adapter, ...)"
    what = f"model_type={kinds[0]!r} is" if kinds else "a model without config.model_type is"
    return f"{what} not in the table ({', '.join(ARCHITECTURES)}). {_likely(model)}"


def _likely(model: nn.Module) -> str:
    """Linear layers that occur once in each of several layers, those with the field's names for a block's end first."""
    counts: dict[str, int] = {}
    for name, module in base_modules(model):
        if (isinstance(module, nn.Linear) or hasattr(module, "nf")) and is_called(model, name):
            end = re.split(r"\.\d+\.", f".{name}")[-1].removeprefix(".")
            counts[end] = counts.get(end, 0) + 1
    repeated = [end for end, count in counts.items() if count > 1] or list(counts)
    repeated.sort(key=lambda end: end.rpartition(".")[2] not in LIKELY)
    if not repeated:
        return "It has no linear layers that an adapter could follow."
    return f"Name the layers that adapters follow: CompacterConfig(target_modules=[...]); likely ones: {repeated[:8]}"


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm, or one without mean (RMS), of torch or of transformers."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.lower().endswith(("layernorm", "rmsnorm"))


def find_modules_to_save(model: nn.Module, config: CompacterConfig) -> list[str]:
    """The modules that are trained whole, in copies: layer norms, and heads that start untrained.

    Raises:
        ValueError: modules_to_save names one that the model does not have.
    """
    norms = [name for name, module in base_modules(model) if config.train_layer_norms and _trains(module)]
    whole = heads(model) if config.modules_to_save is None else _named(model, config.modules_to_save)
    return whole + [name for name in norms if not any(name == w or name.startswith(f"{w}.") for w in whole)]


def _trains(norm: nn.Module) -> bool:
    return is_layer_norm(norm) and next(norm.parameters(), None) is not None


def _named(model: nn.Module, ends: Sequence[str]) -> list[str]:
    names = [name for name, _ in base_modules(model)]
    missing = [end for end in ends if not any(_ends_with(name, end) for name in names)]
    if missing:
        raise ValueError(f"modules_to_save: no module's name ends with {', '.join(missing)}")
    found = [name for name in names if any(_ends_with(name, end) for end in ends)]
    for name in found:
        _check_called(model, name, "modules_to_save")
    return [name for name in found if model.get_submodule(name).state_dict()]  # a ReLU has nothing to train


def heads(model: nn.Module) -> list[str]:
    """The heads, which start untrained, at the top of a model or of one that it wraps: known by their names."""
    found = []
    for path, top in _tops("", model):
        known = (*HEADS, "lm_head") if type(top).__name__.endswith("ForCTC") else HEADS
        children = [(name, child) for name, child in top.named_children() if name in known]
        found += [f"{path}{name}" for name, child in children if not any(map(_of_transformers, child.modules()))]
    return found


def _tops(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module, and what it wraps (as torch.compile does) or holds, down to models of transformers."""
    yield path, module
    if _of_transformers(module):
        return
    children = [(name, child) for name, child in module.named_children() if not isinstance(child, Added)]
    wraps = len(children) == 1 and next(module.parameters(recurse=False), None) is None
    for name, child in children:
        if wraps or any(map(_of_transformers, child.modules())):
            yield from _tops(f"{path}{name}.", child)


def _of_transformers(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "base_model_prefix", None), str)
