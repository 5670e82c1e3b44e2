"""Which modules of a model get an adapter, and which are trained whole, as copies."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from compacter_kernels.config import AdapterConfig
from compacter_kernels.targets.added import Added
from compacter_kernels.targets.architectures import ARCHITECTURES, BLOCK_OPTIONS, Architecture
from compacter_kernels.targets.wrappers import plain_path

# Usual names of the last linear layer of a block, and of heads.
LIKELY = ("o_proj", "out_proj", "c_proj", "wo", "down_proj", "fc2", "dense", "lin2", "out_lin", "output_dense", "o")
HEADS = ("classifier", "pre_classifier", "classification_head", "projector", "score", "qa_outputs")
# Attention classes that, like nn.MultiheadAttention, read the weights of their modules and never
# call these modules.
WEIGHT_READERS = ("WavLMAttention",)


class Target(NamedTuple):
    """The names of the modules that one adapter belongs to, and the number of their layer.

    The adapter takes the output of `write`. A parallel one also takes the input of `read`.

    residual: the module whose input the block adds to its output, "" if it is not known. norm: the
    layer norm of that sum, "" if none follows. first: the first layer of the stack, "" if there is
    none. like: a module whose output is as wide as the input of `write`, which is what the adapter
    then takes; "" for the others.
    """

    write: str
    read: str
    layer: int
    residual: str = ""
    norm: str = ""
    first: str = ""
    like: str = ""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base with their names, without the modules that `inject` has added."""
    added = None
    for name, module in model.named_modules():  # The parts of a module follow directly after it.
        if isinstance(module, Added):
            added = f"{name}."
        elif added is None or not name.startswith(added):
            yield name, module


def names_ending_with(model: nn.Module, ends: Sequence[str], option: str, hint: Callable[[], str] = str) -> list[str]:
    """The names of the base's modules that end with one of `ends`, in the order of the model.

    ValueError names the option of the config that holds `ends`, if no name has one of them, with a
    hint, or if the model never calls one of the modules.
    """
    names = [name for name, _ in base_modules(model)]
    missing = [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in names)]
    if missing:
        raise ValueError(f"{option}: no module's name ends with {', '.join(missing)}{hint()}")
    chosen = [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    check_called(model, chosen, option)
    return chosen


def check_called(model: nn.Module, names: Sequence[str], option: str) -> None:
    """Raise ValueError, which names the option, if the model never calls one of these modules."""
    for name in names:
        if not is_called(model, name):
            attention = name.rpartition(".")[0] or type(model).__name__
            raise ValueError(
                f"{option}: {name} is never called, {attention} reads its weights itself; name the attention, "
                f"{attention.rpartition('.')[2]!r}"
            )


def is_called(model: nn.Module, path: str) -> bool:
    """Whether the model calls this module. Some attention classes only read a module's weights."""
    parts = path.split(".")
    parents = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return not any(map(_reads_weights, parents))


def _reads_weights(module: nn.Module) -> bool:
    if not isinstance(module, nn.MultiheadAttention):
        return type(module).__name__ in WEIGHT_READERS
    for kind in type(module).__mro__:
        # A subclass with its own forward may call its modules, unless its forward calls super's.
        forward = vars(kind).get("forward")
        if inspect.isfunction(forward) and "super" not in forward.__code__.co_names:
            return kind is nn.MultiheadAttention
    return True


def model_types(model: nn.Module) -> list[str]:
    """The `config.model_type` of the model and of the models that it consists of."""
    types = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return list(dict.fromkeys(kind for kind in types if isinstance(kind, str)))


def find_targets(model: nn.Module, config: AdapterConfig) -> list[Target]:
    """The targets that the config asks for, in the order of the model's modules.

    ValueError lists likely names, if the table does not list the model or the model has none.
    """
    if config.target_modules is None:
        targets = list(_of_table(model, config))
    else:
        ends = config.target_modules
        targets = numbered(names_ending_with(model, ends, "target_modules", lambda: f". {likely_targets(model)}"))
    if not targets:
        kinds = model_types(model)
        if any(kind in ARCHITECTURES for kind in kinds):
            raise ValueError(f"a model of type {', '.join(kinds)} has no block of the kind asked for (mh_adapter, ...)")
        subject = f"model_type={kinds[0]!r} is" if kinds else "a model without config.model_type is"
        raise ValueError(f"{subject} not in the table ({', '.join(ARCHITECTURES)}). {likely_targets(model)}")
    return without_layers(targets, config.leave_out)


def without_layers(targets: Sequence[Target], leave_out: Sequence[int]) -> list[Target]:
    """The targets of the other layers; ValueError if there are none."""
    kept = [target for target in targets if target.layer not in leave_out]
    if targets and not kept:
        layers = sorted({target.layer for target in targets})
        raise ValueError(f"leave_out={list(leave_out)} leaves no layer an adapter; there are {layers}")
    return kept


def block_pattern(architecture: Architecture, names: str) -> re.Pattern[str]:
    """Matches the full names of a block's modules. The groups are `stack` and `layer`, a number."""
    names = re.escape(names).replace(r"\*", r"\d+").replace(r"\|", "|")
    return re.compile(rf"(?P<stack>(?:.*\.)?(?:{architecture.layers}))\.(?P<layer>\d+)\.(?:{names})")


def _of_table(model: nn.Module, config: AdapterConfig) -> Iterator[Target]:
    families = dict.fromkeys(ARCHITECTURES[kind] for kind in model_types(model) if kind in ARCHITECTURES)
    patterns = [
        (family, [block_pattern(family, names) for names in block])
        for family in families
        for kind, option in BLOCK_OPTIONS.items()
        if getattr(config, option) and (block := getattr(family, kind))
    ]
    full: dict[str, str] = {}  # From plain names to full names; a wrapper comes before its content.
    for name, _ in base_modules(model):
        full.setdefault(plain_path(model, name), name)
    # How many layers come before each stack: a decoder's layers count on after the encoder's.
    layer_name = re.compile(rf"((?:.*\.)?(?:{'|'.join(family.layers for family in families)}))\.(\d+)")
    sizes = {match[1]: int(match[2]) + 1 for name in full if (match := layer_name.fullmatch(name))}
    before = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    for name in full:
        for family, (read, write, norm) in patterns:
            match = write.fullmatch(name)
            if match:
                in_layer = [other for other in full if other.startswith(f"{match['stack']}.{match['layer']}.")]
                source, normed = (full.get(_nearest(in_layer, part, name), "") for part in (read, norm))
                residual, after = (source, normed) if family.norms == "after" else (normed, "")
                layer, first = before[match["stack"]] + int(match["layer"]), full.get(f"{match['stack']}.0", "")
                yield Target(full[name], source, layer, residual, after, first)
                break


def _nearest(names: Sequence[str], pattern: re.Pattern[str], name: str) -> str:
    """The name that fits and begins most like `name`; "" if none fits.

    The blocks of a T5 have norms of one name.
    """
    fitting = (other for other in names if pattern.fullmatch(other))
    parts = name.split(".")
    return max(fitting, key=lambda other: [a == b for a, b in zip(other.split("."), parts, strict=False)], default="")


def numbered(names: Sequence[str]) -> list[Target]:
    """Targets that are modules of these names, each with the number of its layer.

    The number is the first one in the name. Those of a second stack count on after the first's.
    """
    stacks: dict[str, dict[str, int]] = {}
    firsts: dict[str, str] = {}
    for name in names:
        stack, layer = (re.match(r"(.*?\.?)(\d+)\.", name) or re.match(r"()(0?)", name)).groups()  # type: ignore[union-attr]
        firsts[name] = f"{stack}0" if layer else ""
        stacks.setdefault(stack, {})[name] = int(layer or 0)
    targets, offset = [], 0
    for layers in stacks.values():
        targets += [Target(name, name, offset + layer, first=firsts[name]) for name, layer in layers.items()]
        offset += max(layers.values()) + 1
    return targets


def likely_targets(model: nn.Module) -> str:
    """Names of linear layers that occur in several layers, usual names of a block's end first."""
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
    """Whether a module is a layer norm or an RMS norm, of torch or of transformers."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.lower().endswith(("layernorm", "rmsnorm"))


def find_modules_to_save(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The names of the modules to train as copies; ValueError if one is missing or never called."""
    if config.modules_to_save is None:
        whole = list(_heads(model))
    else:
        named = names_ending_with(model, config.modules_to_save, "modules_to_save")
        whole = [name for name in named if model.get_submodule(name).state_dict()]  # Not a ReLU.
    norms = [
        name
        for name, module in base_modules(model)
        if config.train_layer_norms and is_layer_norm(module) and next(module.parameters(), None) is not None
    ]
    return whole + [name for name in norms if not any(f"{name}.".startswith(f"{other}.") for other in whole)]


def _heads(model: nn.Module) -> Iterator[str]:
    """The names of heads, which start untrained, at the top of a model or of a model inside it."""
    for path, top in _tops("", model):
        names = (*HEADS, "lm_head") if type(top).__name__.endswith("ForCTC") else HEADS
        for name, child in top.named_children():
            if name in names and not any(map(_of_transformers, child.modules())):
                yield f"{path}{name}"


def _tops(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and the modules inside it, down to models of transformers.

    A module may wrap a model, as torch.compile does, or hold one, as a training loop's class does.
    """
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
