"""examples/direction_of_arrival against plain statements with direct inverses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from example_folders import first_on_path
from torch import Tensor

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "direction_of_arrival"
RESULTS = ROOT / "benchmarks" / "results" / "direction_of_arrival"
C128 = torch.complex128

_path = first_on_path(FOLDER)


def module(name: str = "estimators") -> Any:
    return importlib.import_module(name)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=C128)


def heard(directions: list[float], sensors: int, snapshots: int, noise: float) -> Tensor:
    a = module().steering(sensors, torch.tensor(directions))
    return a.T @ draw(len(directions), snapshots) + noise * draw(sensors, snapshots, seed=1)


def test_the_lemma_equals_the_inverse() -> None:
    r, x = torch.eye(6, dtype=C128).repeat(3, 1, 1), draw(9, 3, 6)
    inverse = torch.linalg.inv(r)
    for snapshot in x:
        r = 0.9 * r + snapshot[:, :, None] * snapshot.conj()[:, None, :]
        inverse = module().updated(inverse, snapshot, 0.9)
        torch.testing.assert_close(inverse, torch.linalg.inv(r), rtol=1e-10, atol=1e-10)


def test_the_constrained_minimum() -> None:
    """w^H a = 1, w^H R w is P, and a step that keeps the constraint makes it larger."""
    half, a = draw(8, 5), draw(5, seed=2)
    r = half.mH @ half
    w, power = module().constrained(torch.linalg.inv(r), a)
    assert (w.conj() @ a).item() == pytest.approx(1)
    assert (w.conj() @ r @ w).real.item() == pytest.approx(power.item())
    for seed in range(5):
        step = draw(5, seed=10 + seed)
        step = w + 0.1 * (step - a * (a.conj() @ step) / (a.conj() @ a))
        assert (step.conj() @ a).item() == pytest.approx(1)
        assert (step.conj() @ r @ step).real > power


def test_alternating_against_a_plain_statement() -> None:
    """One direction at a time, S and W by kron, covariances as sums, direct inverses."""
    estimators, blocks, sensors = module(), 4, 12
    x, theta = heard([5.0, -20.0], sensors, 7, 0.3), torch.tensor([-20.0, 5.0, 40.0])
    forget, length = estimators.FORGET, sensors // blocks
    expected = []
    for a in estimators.steering(sensors, theta):
        s = a[:length] / length**0.5
        r_d, r_s = torch.eye(blocks, dtype=C128), torch.eye(length, dtype=C128)
        for snapshot in x.T:
            decomposition = torch.kron(torch.eye(blocks, dtype=C128), s[:, None])
            z, c = decomposition.mH @ snapshot, decomposition.mH @ a
            r_d = forget * r_d + torch.outer(z, z.conj())
            w = torch.linalg.inv(r_d) @ c
            power = 1 / (c.conj() @ w).real
            weights = torch.kron((w * power)[:, None], torch.eye(length, dtype=C128))
            y, e = weights.mH @ snapshot, weights.mH @ a
            r_s = forget * r_s + torch.outer(y, y.conj())
            s = torch.linalg.inv(r_s) @ e
            s = s / (e.conj() @ s) / (s / (e.conj() @ s)).norm()
        expected.append(power)
    torch.testing.assert_close(estimators.alternating(x, theta, blocks), torch.stack(expected), rtol=1e-8, atol=1e-10)


def test_parts_of_one_sensor_give_capons_estimate() -> None:
    x, theta = heard([5.0, -20.0], 8, 20, 0.3), torch.linspace(-60, 60, 13)
    estimators = module()
    torch.testing.assert_close(estimators.alternating(x, theta, 8), estimators.capon(x, theta), rtol=1e-9, atol=1e-12)
    r = estimators.FORGET**20 * torch.eye(8, dtype=C128)
    for age, snapshot in enumerate(x.T.flip(0)):
        r = r + estimators.FORGET**age * torch.outer(snapshot, snapshot.conj())
    expected = [1 / (a.conj() @ torch.linalg.inv(r) @ a).real for a in estimators.steering(8, theta)]
    torch.testing.assert_close(estimators.capon(x, theta), torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("true", [[0.0], [-31.0, 12.0], [-40.0, 3.0, 55.0]], ids=str)
def test_the_spectra_peak_at_the_true_directions(true: list[float]) -> None:
    estimators, grid = module(), torch.arange(-80, 80.1, 0.5)
    x = heard(true, 24, 60, 0.1)
    spectra = {
        "alternating": estimators.alternating(x, grid, 6),
        "capon": estimators.capon(x, grid),
        "music": estimators.music(x, grid, len(true)),
        "beamformer": estimators.beamformer(x, grid),
    }
    for name, power in spectra.items():
        assert (estimators.peaks(power, grid, len(true)) - torch.tensor(true)).abs().max() <= 0.5, name


def test_peaks_of_a_flat_spectrum() -> None:
    assert module().peaks(torch.ones(5), torch.arange(5.0), 2).numel() == 0
    assert module().peaks(torch.tensor([3.0, 1, 2, 1, 4, 0]), torch.arange(6.0), 1).tolist() == [4]


def test_the_short_form_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert module("estimate_directions").main(["--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "directions.md").read_text(encoding="utf-8") == capsys.readouterr().out
    document = json.loads((tmp_path / "directions.json").read_text(encoding="utf-8"))
    assert [len(case["resolved"]) for case in document["cases"]] == [2] * 6


def test_the_readme_states_the_committed_results() -> None:
    document = json.loads((RESULTS / "directions.json").read_text(encoding="utf-8"))
    script = module("estimate_directions")
    table = script.table(document["cases"])
    assert table in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert table in (RESULTS / "directions.md").read_text(encoding="utf-8")
    cases = [
        script.Case(*(tuple(v) if isinstance(v, list) else v for v in list(case.values())[:4]))
        for case in document["cases"]
    ]
    assert cases == list(script.CASES)
