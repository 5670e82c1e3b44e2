"""The benchmark: its files, its refusals to time, and its counts.

No test here depends on a measured time.
"""

from __future__ import annotations

import csv
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compacter_kernels as ck
from compacter_kernels import cli
from compacter_kernels.bench import cost, cpu, load, providers, report, sweep, worker
from compacter_kernels.bench.settings import CPU_QUICK, CUDA, CUDA_QUICK, Settings
from compacter_kernels.cases import Case, Shape

SHAPE = Shape(24, 12, 4)
PLAIN = ("dense", "dense-cached", "factored")
AVAILABLE = [name for name, reason in ck.available_impls().items() if reason is None]
SMALL = Settings(shapes=(SHAPE,), tokens=(1, 9), providers=PLAIN, rounds=2)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not depend on the rates of the machine."""
    monkeypatch.setattr("compacter_kernels.bench.cpu.COPY_BYTES", 2**16)
    monkeypatch.setattr("compacter_kernels.bench.cpu.SGEMM_SIZE", 32)


def test_every_file_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--shapes", "24/12/4", "--tokens", "1,9", "--rounds", "2", "--threads", "1"]
    code = cli.main(
        [
            "bench",
            *sizes,
            "--impl",
            ",".join(["dense-cached", *AVAILABLE]),
            "--out",
            str(tmp_path),
            "--page-faults",
            "removed",
        ]
    )
    captured = capsys.readouterr()
    assert code == 0
    assert "MALLOC_MMAP_THRESHOLD_ = 4294967296" in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench.json",
        "bench.csv",
        "bench.txt",
        "bench_faults_removed.png",
    }
    found = json.loads((tmp_path / "bench.json").read_text())
    (table,) = found["tables"]
    assert table["machine"]["threads"] == 1
    assert table["machine"]["torch"] == torch.__version__
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert len(rows) == len(table["rows"]) == 2 * (1 + 2 * (1 + len(AVAILABLE)))  # dense-cached has no backward
    assert {row["provider"] for row in rows} == {"copy", "dense-cached", *AVAILABLE}
    assert all(float(row["ms"]) > 0 and row["page_faults"] == "removed" for row in rows)
    assert (tmp_path / "bench_faults_removed.png").read_bytes().startswith(b"\x89PNG")
    assert captured.out == (tmp_path / "bench.txt").read_text() + "\n"


def test_rows_compare_with_the_copies_and_with_dense() -> None:
    rows = sweep.run(SMALL)["rows"]
    time_of = {(row["tokens"], row["provider"], row["direction"]): row["ms"] for row in rows}
    for row in rows:
        clone = time_of[row["tokens"], "copy", cost.FORWARD]
        assert row["over_clone"] == pytest.approx(row["ms"] / clone)
        assert row["over_equal_copy"] == pytest.approx(row["ms"] / time_of[row["tokens"], "copy", row["direction"]])
        if row["provider"] != "copy":
            dense = time_of[row["tokens"], "dense", row["direction"]]
            assert row["dense_over_this"] == pytest.approx(dense / row["ms"])
            assert row["checked_tokens"] == row["tokens"]
        assert row["ms_q20"] <= row["ms"] <= row["ms_q80"]


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Any) -> providers.Call:
        right = providers.eager(providers.through("factored"))(case)
        return lambda: right() * 1.001

    known = {**providers.providers(), "factored": providers.Provider("factored", wrong)}
    monkeypatch.setattr(sweep, "providers", lambda *_: known)
    table = sweep.run(SMALL)
    assert "factored" not in {row["provider"] for row in table["rows"]}
    (first, _) = [absent for absent in table["absent"] if absent["provider"] == "factored"]
    assert first["wrong"]
    assert first["reason"].startswith("failed the correctness gate: out: error 0.001")
    table |= {"page_faults": "kept", "machine": {"threads": 1}}
    assert "failed the correctness gate" in report.table_text("cpu", table, "float32")


def test_a_provider_that_cannot_run_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(case: Any) -> providers.Call:
        raise RuntimeError("no C++ compiler found\nlong explanation")

    broken = providers.Provider("factored-compiled", no_compiler)
    known = {**providers.providers(), broken.name: broken}
    monkeypatch.setattr(sweep, "providers", lambda *_: known)
    settings = Settings(shapes=(SHAPE,), tokens=(3,), providers=("factored", broken.name), rounds=2)
    table = sweep.run(settings)
    absent = {row["provider"]: row for row in table["absent"]}[broken.name]
    assert (absent["reason"], absent["wrong"]) == ("RuntimeError: no C++ compiler found", False)
    assert "factored" in {row["provider"] for row in table["rows"]}


def test_a_measuring_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "COMMAND", ("false",))
    with pytest.raises(ChildProcessError, match="exit code 1"):
        next(cpu.tables(SMALL))


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "memory_bytes", lambda: 2**10)
    table = sweep.run(SMALL)
    assert table["rows"] == []
    assert [row["cell"] for row in table["absent"] if row["provider"] == "all"] == ["24/12/4 T=1", "24/12/4 T=9"]
    table |= {"page_faults": "kept", "machine": {"threads": 1}}
    assert "skipped: needs about" in report.table_text("cpu", table, "float32")


def test_a_sweep_without_time_left_says_so() -> None:
    table = sweep.run(replace(SMALL, providers=("factored", "factored-compiled"), limit=1e-9))
    assert {(row["tokens"], row["provider"]) for row in table["rows"]} == {(1, "copy"), (1, "factored")}
    reasons = {(row.get("cell"), row["provider"]): row["reason"] for row in table["absent"]}
    assert reasons["24/12/4 T=1", "factored-compiled"] == "not compiled, no time was left; give --limit more"
    assert reasons["24/12/4 T=9", "all"] == "skipped: no time was left; give --limit more"


@pytest.mark.parametrize("impl", AVAILABLE)
def test_saved_bytes(impl: str) -> None:
    saved = providers.saved_bytes(providers.providers()[impl], Case.of(SHAPE, 50).inputs())
    assert saved is not None
    bottleneck = 50 * SHAPE.d * 4
    assert saved == 0 if impl not in ("dense", "factored") else saved >= bottleneck


def test_every_available_impl_has_a_provider() -> None:
    assert set(AVAILABLE) | {"copy", "dense-cached", "factored-compiled"} == set(providers.providers())
    assert set(providers.missing()) == set(ck.available_impls()) - set(AVAILABLE)


def test_forward_is_without_grad_and_both_gives_every_gradient() -> None:
    case = Case.of(SHAPE, 5).inputs()
    provider = providers.providers()["factored"]
    out = providers.make_call(provider, case, cost.FORWARD)()
    assert isinstance(out, torch.Tensor) and not out.requires_grad
    grads = providers.make_call(provider, case, cost.BOTH)()
    assert isinstance(grads, tuple) and len(grads) == 9
    assert not case.x.requires_grad


def test_the_model_counts_what_the_formula_says() -> None:
    assert cost.flops(Shape(768, 24, 4), 1, cost.FORWARD) == 4 * 768 * 4 + 4 * 24 * 4 + 4 * 64
    assert cost.flops(Shape(768, 24, 4), 2, cost.BOTH) == 2 * (14 * 768 * 4 + 16 * 24 * 4 + 16 * 64)
    assert cost.traffic(Shape(768, 24, 4), 10, cost.FORWARD, 2) == 2 * 10 * 768 * 2
    assert cost.traffic(Shape(768, 24, 4), 10, cost.BOTH, 4) == 5 * 10 * 768 * 4


def test_disturbed_samples_are_repeated_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand involuntary switches happen beside one sample in five."""
    switches = iter(range(10**6))
    monkeypatch.setattr(load, "involuntary_switches", lambda: 1000 * (next(switches) // 5))
    monkeypatch.setattr(load.Moment, "crowded", lambda *_: False)
    monkeypatch.setattr(load, "WINDOW", 0.0)
    timing = cpu.Timing(lambda: time.sleep(1e-3))
    cpu.interleave([timing], 6, 1.0, threads=1, cores=1)
    assert (len(timing.samples), len(timing.disturbed), timing.quiet) == (6, 1, True)


def test_a_machine_that_is_never_quiet_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.Moment, "crowded", lambda *_: True)
    timing = cpu.Timing(lambda: None)
    cpu.interleave([timing], 5, 1.0, threads=1, cores=1)
    assert (timing.samples, timing.quiet) == ([], False)
    assert len(timing.disturbed) == 5 * cpu.MAX_REPEATS
    assert timing.quantiles()[0] > 0


def test_crowded() -> None:
    start = load.Moment(wall=0.0, own=0.0, busy=0.0, stolen=0.0)
    assert not start.crowded(load.Moment(1.0, 2.0, 2.0, 0.0), threads=2, cores=2)
    assert start.crowded(load.Moment(1.0, 1.5, 2.0, 0.0), threads=2, cores=2)
    assert start.crowded(load.Moment(1.0, 1.8, 1.8, 0.2), threads=2, cores=2)
    assert not start.crowded(load.Moment(1.0, 2.0, 3.0, 0.0), threads=2, cores=4)
    assert load.preempted(400, 1.0) and not load.preempted(1, 1e-3)


def test_quantiles() -> None:
    timing = cpu.Timing(lambda: None, samples=[5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert timing.quantiles() == (2.0, 3.5, 5.0)


def test_page_faults_are_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    removed, kept = (cpu.environment(kind, 3) for kind in ("removed", "kept"))
    assert all(removed[name] == "4294967296" for name in cpu.VARIABLES)
    assert not set(cpu.VARIABLES) & set(kept)
    assert removed["OMP_NUM_THREADS"] == "3" and kept["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("settings", [Settings(), CPU_QUICK, SMALL, CUDA, CUDA_QUICK])
def test_settings_survive_json(settings: Settings) -> None:
    assert Settings.from_json(settings.to_json()) == settings
    assert isinstance(Settings.from_json(settings.to_json()).shapes[0], Shape)


@pytest.mark.parametrize(
    ("ms", "expected"), [(None, "-"), (0.0123, "12.3 us"), (1.856, "1.86 ms"), (245.0, "245 ms"), (1500.0, "1.50 s")]
)
def test_durations_choose_their_unit(ms: float | None, expected: str) -> None:
    assert report.duration(ms) == expected
