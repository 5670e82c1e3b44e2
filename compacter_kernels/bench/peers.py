"""The peers: what a user would run otherwise, as providers beside those of `providers.py`.

A peer is a module with weights of its own. In training it is asked for the gradients of x and of
all that it trains. It is in the dtype of x; with a 16-bit x the limit on its error is that of the
providers in low precision. `module` is our own module, so that modules are compared with a module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from compacter_kernels.bench import peer_modules as modules
from compacter_kernels.bench.providers import Call, Formula, OwnWeights, Provider
from compacter_kernels.cases import Inputs


class Peer(NamedTuple):
    """build: makes the module. formula: what it computes. package: that it needs, beside torch."""

    what: str
    method: str
    build: Callable[[Inputs], modules.Parts]
    formula: Formula
    package: str | None = None
    compiled: bool = False


_lora = functools.partial(modules.peft, config="LoraConfig")
_lokr = functools.partial(modules.peft, config="LoKrConfig")
_patched = functools.partial(_lokr, patched=True)
_bypass = functools.partial(modules.lycoris, bypass=True)
_lycoris_patched = functools.partial(modules.lycoris, patched=True)
_COMPACTER, _BOTTLENECK, _LORA, _LOKR = (
    ("Compacter", modules.compacter_formula),
    ("bottleneck", modules.bottleneck_formula),
    ("LoRA", modules.lora_formula),
    ("LoKr", modules.lokr_formula),
)


def _peer(what: str, method: tuple[str, Formula], build: Callable[[Inputs], modules.Parts], *rest: object) -> Peer:
    return Peer(what, method[0], build, method[1], *rest)  # type: ignore[arg-type]


PEERS = {
    "module": _peer("CompacterAdapter of this package", _COMPACTER, modules.ours),
    "adapters": _peer("Compacter of adapters as shipped", _COMPACTER, modules.adapters, "adapters"),
    "adapters-compiled": _peer("the same under torch.compile", _COMPACTER, modules.adapters, "adapters", True),
    "bottleneck": _peer("plain bottleneck adapter of two nn.Linear", _BOTTLENECK, modules.bottleneck),
    "bottleneck-compiled": _peer("the same under torch.compile", _BOTTLENECK, modules.bottleneck, None, True),
    "lora": _peer("LoRA of peft, rank 8", _LORA, _lora, "peft"),
    "lokr": _peer("LoKr of peft as shipped, rank 8", _LOKR, _lokr, "peft"),
    "lokr-patched": _peer("the same under ck.patch", _LOKR, _patched, "peft"),
    "lycoris": _peer("LoKr of lycoris as shipped, rank 8", _LOKR, modules.lycoris, "lycoris-lora"),
    "lycoris-bypass": _peer("the same with bypass_mode", _LOKR, _bypass, "lycoris-lora"),
    "lycoris-patched": _peer("the same under ck.patch", _LOKR, _lycoris_patched, "lycoris-lora"),
}
LYCORIS_KERNELS = "lycoris-kernels"


def _installed(package: str | None) -> str | None:
    """Return the version of a package, "" for none, and None where it is not installed."""
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return None


def _bind(peer: Peer, dtype: torch.dtype, case: Inputs) -> Call:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        function, module, weights = peer.build(case)
    module.to(device=case.x.device, dtype=dtype)
    if peer.compiled:
        function = torch.compile(function, dynamic=False)
    return OwnWeights(function, case.x, weights)


def providers(dtype: torch.dtype) -> dict[str, Provider]:
    """Return the peers whose packages are installed, by name."""
    found = {}
    for name, peer in PEERS.items():
        if _installed(peer.package) is not None:
            bind = functools.partial(_bind, peer, dtype)
            loose = dtype.itemsize == 2
            options = {"loose": loose, "compiled": peer.compiled, "formula": peer.formula, "method": peer.method}
            found[name] = Provider(name, bind, **options)  # type: ignore[arg-type]
    return found


def missing(device: str) -> dict[str, str]:
    """Return the peers that cannot run here, and why."""
    absent = {name: peer.package for name, peer in PEERS.items() if _installed(peer.package) is None}
    found = {name: f"{package} is not installed: pip install {package}" for name, package in absent.items()}
    if device == "cpu":
        found[LYCORIS_KERNELS] = "the kernels of lycoris take tensors on a GPU alone; `lycoris` runs its plain torch"
    return found


def describe() -> dict[str, dict[str, str]]:
    """Return what each peer is, with the version of its package."""
    found = {}
    for name, peer in PEERS.items():
        installed = _installed(peer.package)
        if installed is not None:
            package = f"{peer.package} {installed}" if peer.package else ""
            found[name] = {"what": peer.what, "method": peer.method, "package": package}
    return found
