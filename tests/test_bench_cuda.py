"""The decisions of `bench --device cuda`, which need no device.

They concern the competing providers and their check, copies, shares of time, and the report.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compacter_kernels import cli
from compacter_kernels.accuracy import Oracle
from compacter_kernels.bench import cost, cuda, gate, report, worker
from compacter_kernels.bench.providers import Provider, make_call, providers
from compacter_kernels.bench.settings import CUDA
from compacter_kernels.bench.timer import Cell
from compacter_kernels.cases import Case, Shape

SHAPE = Shape(96, 24, 4)
BF16 = torch.bfloat16
PROVIDERS = providers("cuda", BF16)
LOOSE = [provider for provider in PROVIDERS.values() if provider.loose and not provider.compiled]


@pytest.mark.parametrize("provider", LOOSE, ids=lambda provider: provider.name)
def test_providers_in_low_precision_pass_their_own_gate(provider: Provider) -> None:
    verdict = gate.judge(provider, Oracle(Case.of(SHAPE, 64, dtype=BF16).inputs()))
    assert verdict.wrong is None
    strict = gate.judge(provider._replace(loose=False), Oracle(Case.of(SHAPE, 64, dtype=BF16).inputs()))
    assert verdict.worst is not None
    assert (strict.wrong is not None) == (verdict.worst > 1)


@pytest.mark.parametrize("loose", [False, True])
def test_a_wrong_provider_fails_either_gate(loose: bool) -> None:
    case = Case.of(SHAPE, 64, dtype=BF16).inputs()
    wrong = Provider("wrong", lambda c: lambda: c.x * 1.5, (cost.FORWARD,), loose=loose)
    assert gate.judge(wrong, Oracle(case)).wrong is not None


def test_providers_of_a_wide_dtype_have_no_low_precision() -> None:
    wide = providers("cuda", torch.float32)
    assert [name for name in PROVIDERS if name not in wide] == [p.name for p in PROVIDERS.values() if p.loose]
    assert [name for name in wide if name.endswith("compiled")] == ["dense-compiled", "factored-compiled"]
    assert not any(provider.loose for provider in wide.values())


def test_what_a_call_returns_is_what_a_fused_call_writes() -> None:
    case = Case.of(SHAPE, 8, dtype=BF16).inputs()
    for name, gradients in (("copy", 1), ("dense", 9)):
        provider = PROVIDERS[name]
        out = make_call(provider, case, cost.FORWARD, keep_out=True)()
        assert isinstance(out, torch.Tensor) and out.shape == case.x.shape
        both = make_call(provider, case, cost.BOTH, keep_out=True)()
        assert isinstance(both, tuple) and len(both) == 1 + gradients
        assert torch.equal(both[0], out) and not both[0].requires_grad


def test_copies_are_several_times_the_cache() -> None:
    for tokens in (1, 256, 16384):
        cell = Cell(Shape(768, 24, 4), tokens)
        for direction in cost.DIRECTIONS:
            count = cuda.copies_needed(cell, BF16, direction, 60 * 2**20)
            together = count * cost.traffic(cell.shape, tokens, direction, 2)
            assert together >= 3 * 60 * 2**20
    assert cuda.copies_needed(Cell(Shape(4096, 128, 8), 65536), BF16, cost.BOTH, 60 * 2**20) == 2


def test_the_shares_of_the_shapes_fit_into_the_limit() -> None:
    left, seconds = CUDA.shapes, CUDA.limit
    for index, shape in enumerate(left):
        share = cuda.allowance(CUDA, left[index:], seconds)
        assert 0 < share <= seconds
        seconds -= share
        assert shape not in CUDA.compiled_shapes or share >= 60
    assert seconds >= 0


def test_a_measuring_process_that_dies_or_hangs_leaves_what_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last argument of the process is the path to which it writes its table."""
    settings = CUDA.__class__(shapes=(SHAPE,), device="cuda", limit=3.0)
    for ending, reason in (("exit 3", "exit code 3"), ("sleep 60", "stopped after 3 s")):
        script = f'echo \'{{"rows": [{{"tokens": 1}}], "absent": []}}\' > "$0"; {ending}'
        monkeypatch.setattr(worker, "COMMAND", ("sh", "-c", script))
        ((table,),) = cuda.tables(settings)
        assert table["rows"] == [{"tokens": 1}]
        (failed,) = table["absent"]
        assert failed["wrong"] and reason in failed["reason"]


def _row(provider: str, direction: str, **other: Any) -> dict[str, Any]:
    row = {**SHAPE._asdict(), "tokens": 64, "provider": provider, "direction": direction}
    row |= {"ms": 0.02, "ms_q20": 0.019, "ms_q80": 0.022, "fraction_of_copy": 0.5, "model_gb_per_s": 2000.0}
    row |= {"eager_us": 30.0, "host_us": 25.0, "peak_bytes": 10**6, "saved_bytes": 0, "error_over_limit": 0.5}
    return row | other


def test_the_report_marks_what_is_beyond_the_contract(tmp_path: Path) -> None:
    device = {"gpu": "G", "capability": "sm_90", "sms": 1, "l2_bytes": 1, "memory_gib": 1}
    device |= {"driver": None, "cuda": "13.0", "triton": "3"}
    names = ("torch", "python", "cpu", "cores", "compacter_kernels", "revision", "time")
    absent = [{"provider": name, "reason": "no", "wrong": False, "cell": "c"} for name in ("a", "b")]
    rows = [_row("fused", d) for d in cost.DIRECTIONS] + [_row("dense-lowp", cost.FORWARD, error_over_limit=2.0)]
    table = {"device": device, "machine": dict.fromkeys(names), "rates": {"copy_gb_per_s": 1.0}}
    found = {"settings": {"device": "cuda", "dtype": "bfloat16"}, "tables": [{**table, "rows": rows, "absent": absent}]}
    paths = report.write(found, tmp_path)
    assert json.loads(paths[0].read_text()) == found
    assert len(list(csv.DictReader(paths[1].read_text().splitlines()))) == 3
    text = paths[2].read_text()
    assert "dense-lowp ~" in text and "fused ~" not in text
    assert "absent: a, b: no (c)" in text


def test_a_report_with_nothing_measured(tmp_path: Path) -> None:
    found = {"settings": {"device": "cuda", "dtype": "bfloat16"}, "tables": [{"rows": [], "absent": []}]}
    assert all(path.is_file() for path in report.write(found, tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_an_error_to_act_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cuda: torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--limit", "5"], ["--compiled-shapes", "24/12/4"], ["--device", "cuda", "--page-faults", "kept"]]
)
def test_options_of_the_other_device_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *options]) == 2
    assert "has no meaning with --device" in capsys.readouterr().err
