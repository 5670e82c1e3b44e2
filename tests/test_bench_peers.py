"""The peers of the benchmark: they compute what they say, train what they say, and are named.

No test here depends on a measured time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compacter_kernels.accuracy import Oracle
from compacter_kernels.bench import cost, gate, peers, sweep
from compacter_kernels.bench.providers import OwnWeights, make_call, saved_bytes
from compacter_kernels.bench.settings import Settings
from compacter_kernels.cases import Case, Shape

SHAPE = Shape(96, 24, 4)
EAGER = [name for name, peer in peers.PEERS.items() if not peer.compiled]
WEIGHTS = {"Compacter": 8, "bottleneck": 4, "LoRA": 2}


def provider(name: str, dtype: torch.dtype) -> Any:
    """The peer, where its package is installed."""
    missing = peers.missing("cpu")
    if name in missing:
        pytest.skip(missing[name])
    return peers.providers(dtype)[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_a_peer_computes_its_formula(name: str, dtype: torch.dtype) -> None:
    case = Case.of(SHAPE, 33, dtype=dtype).inputs()
    verdict = gate.judge(provider(name, dtype), Oracle(case))
    assert (verdict.wrong, verdict.tokens) == (None, 33)


@pytest.mark.parametrize("name", EAGER)
def test_a_peer_is_asked_for_what_it_trains(name: str) -> None:
    chosen, case = provider(name, torch.float32), Case.of(SHAPE, 5).inputs()
    out = make_call(chosen, case, cost.FORWARD)()
    assert isinstance(out, torch.Tensor) and out.shape == case.x.shape and not out.requires_grad
    grads = make_call(chosen, case, cost.BOTH)()
    assert isinstance(grads, tuple) and grads[0].shape == case.x.shape
    assert all(float(grad.abs().max()) > 0 for grad in grads)
    assert len(grads) == 1 + WEIGHTS.get(chosen.method, len(grads) - 1)
    assert not case.x.requires_grad


def test_a_peer_that_computes_something_else_is_refused() -> None:
    right = provider("bottleneck", torch.float32)

    def bind(case: Any) -> OwnWeights:
        call = right.bind(case)
        return OwnWeights(lambda x: call.function(x) * 1.001, call.x, tuple(call.leaves[1:]))

    verdict = gate.judge(right._replace(bind=bind), Oracle(Case.of(SHAPE, 33).inputs()))
    assert verdict.wrong is not None and verdict.wrong.startswith("out: error 0.001")


def test_our_module_keeps_nothing_for_the_backward() -> None:
    case = Case.of(SHAPE, 50).inputs()
    assert (saved_bytes(provider("bottleneck", torch.float32), case) or 0) >= 50 * SHAPE.d * 4
    if "cpu" in sweep.providers("cpu"):
        assert saved_bytes(provider("module", torch.float32), case) == 0


def test_rows_of_another_method_have_no_model_of_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compacter_kernels.bench.cpu.COPY_BYTES", 2**16)
    monkeypatch.setattr("compacter_kernels.bench.cpu.SGEMM_SIZE", 32)
    wanted = ("module", "bottleneck")
    table = sweep.run(Settings(shapes=(SHAPE,), tokens=(3,), providers=wanted, rounds=2, peers=True))
    rates = {row["provider"]: row["model_gflops"] for row in table["rows"]}
    assert rates["bottleneck"] is None and rates["module"] > 0
    assert table["peers"]["bottleneck"] == {
        "what": "plain bottleneck adapter of two nn.Linear",
        "method": "bottleneck",
        "package": "",
    }


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_installed", lambda package: None if package == "peft" else "1.0")
    missing = peers.missing("cpu")
    assert missing["lora"] == "peft is not installed: pip install peft"
    assert {"lora", "lokr", "lokr-patched", peers.LYCORIS_KERNELS} == set(missing)
    assert "lora" not in peers.providers(torch.float32) and "lora" not in peers.describe()
