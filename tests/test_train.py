"""The fine-tuning demonstration: trained parameters, agreement, files, and refusals."""

from __future__ import annotations

import copy
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("sklearn")

import digits_report as report
from compacter_kernels import train
from compacter_kernels.cli import main
from compacter_kernels.dispatch import ENVIRONMENT
from compacter_kernels.impl import cpu
from digits_data import Split, Task, load_tasks
from digits_methods import FROZEN_BASE, FUSED, METHODS, REFERENCE, build, impl_of
from digits_model import VisionTransformer
from digits_training import batches, evaluate, fit, saved_bytes
from train_common import schedule

TINY = ["--steps", "4", "--seeds", "2", "--pretraining-steps", "2", "--quick"]
HEAD = {"head.weight", "head.bias"}


class Run(NamedTuple):
    code: int
    output: str
    folder: Path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small, so that a second thread would mostly wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tasks() -> tuple[Task, Task]:
    return load_tasks()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the script with every method, in a new process and another folder."""
    folder = tmp_path_factory.mktemp("train") / "new" / "folder"
    command = [sys.executable, str(train.folder() / "train_digits.py"), *TINY, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parents[1])
    assert done.stderr == ""
    return Run(done.returncode, done.stdout, folder)


@pytest.fixture
def pretrained() -> VisionTransformer:
    return VisionTransformer(5, hidden_size=32, layers=2)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def test_the_table_has_every_method_and_the_verdict(tiny_run: Run) -> None:
    assert tiny_run.code == 0
    for method in (FROZEN_BASE, *METHODS.values()):
        assert method.title in tiny_run.output
    assert "the loss curves are the same" in tiny_run.output


def test_the_csv_has_a_row_per_method(tiny_run: Run) -> None:
    with (tiny_run.folder / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["frozen", *METHODS]
    assert list(rows[0]) == [
        "method",
        "impl",
        "accuracy_mean",
        "accuracy_std",
        "seeds",
        "trainable_parameters",
        "trainable_percent",
        "learning_rate",
        "step_ms",
        "step_ratio",
        "saved_bytes",
    ]
    by_name = {row["method"]: row for row in rows}
    assert by_name[REFERENCE]["impl"] == "dense"
    assert by_name["full"]["trainable_percent"] == "100.0"
    assert by_name["frozen"]["step_ratio"] == "1.0"
    assert all(float(row["step_ms"]) > 0 for row in rows)


def test_the_loss_curves_are_complete(tiny_run: Run) -> None:
    with (tiny_run.folder / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["seed"], r["step"]) for r in rows] == [
        (method, str(seed), str(step)) for method in METHODS for seed in range(2) for step in range(4)
    ]


def test_the_json_tells_settings_machine_and_agreement(tiny_run: Run) -> None:
    document = json.loads((tiny_run.folder / "train.json").read_text())
    assert set(document) == {"machine", "settings", "pretrained_accuracy", "methods", "agreement"}
    assert document["settings"]["steps"] == 4
    assert document["agreement"]["holds"] is True
    assert document["agreement"]["steps"] == 4
    assert len(document["methods"][-1]["accuracies"]) == 2


def test_the_plot_is_a_picture(tiny_run: Run) -> None:
    pytest.importorskip("matplotlib")
    assert (tiny_run.folder / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_losses(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--methods", "compacter++,probe", "--out", str(tmp_path), "--json", "--no-plot"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "train.json").read_text())
    assert printed["agreement"] is None
    assert not (tmp_path / "losses.png").exists()
    again = (tmp_path / "losses.csv").read_text().splitlines()[1:]
    before = (tiny_run.folder / "losses.csv").read_text().splitlines()
    assert again == [line for line in before if line.startswith(("probe", "compacter++"))]


@pytest.mark.parametrize("name", METHODS)
def test_only_what_the_method_says_trains(name: str, pretrained: VisionTransformer, tasks: tuple[Task, Task]) -> None:
    before = state(pretrained)
    model = build(METHODS[name], pretrained, 5, seed=0)
    start = state(model)
    fit(model, tasks[1].train, steps=5, rate=1e-2, seed=0)
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], start[key])}
    norms = {key for key in before if "norm" in key}
    adapters = {key for key in after if "adapter" in key}
    assert changed == {
        "probe": HEAD,
        "full": set(before),
    }.get(name, HEAD | norms | adapters)
    assert all(torch.equal(pretrained.state_dict()[key], value) for key, value in before.items())
    assert all(torch.equal(after[key], before[key]) for key in set(before) - changed)


@pytest.mark.parametrize(("name", "adapters"), [(FUSED, 4), ("compacter++", 2)])
def test_compacter_shares_one_rule(name: str, adapters: int, pretrained: VisionTransformer) -> None:
    model = build(METHODS[name], pretrained, 5, seed=0)
    keys = [key for key, _ in model.named_parameters(remove_duplicate=False) if key.endswith("phm_rule")]
    assert len(keys) == 2 * adapters
    assert len({id(model.get_parameter(key)) for key in keys}) == 1
    assert ("blocks.0.attention_adapter.down.phm_rule" in keys) == (name == FUSED)


def test_dense_and_auto_give_the_same_loss_curve(tasks: tuple[Task, Task]) -> None:
    torch.manual_seed(0)
    pretrained = VisionTransformer(5, layers=2)
    curves, impls = [], []
    for name in (REFERENCE, FUSED):
        model = build(METHODS[name], pretrained, 5, seed=1)
        impls.append(impl_of(model))
        curves.append(fit(model, tasks[1].train, steps=100, rate=3e-2, seed=1))
    assert impls[0] == "dense" != impls[1]
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert report.differences({REFERENCE: curves[:1], FUSED: curves[1:]}).max() <= 1e-4


def test_a_fused_adapter_saves_less_than_a_dense_one(pretrained: VisionTransformer, tasks: tuple[Task, Task]) -> None:
    batch = Split(tasks[1].train.images[:16], tasks[1].train.labels[:16])
    names = ("probe", FUSED, REFERENCE, "adapter", "full")
    saved = {name: saved_bytes(build(METHODS[name], pretrained, 5, seed=0), batch) for name in names}
    assert saved["probe"] < saved[FUSED] < saved[REFERENCE]
    assert saved[FUSED] < saved["adapter"] < saved["full"]


def test_the_gradient_passes_through_the_frozen_base(pretrained: VisionTransformer, tasks: tuple[Task, Task]) -> None:
    model = build(FROZEN_BASE, pretrained, 5, seed=0)
    reached: list[bool] = []
    model.blocks[0].register_full_backward_hook(lambda *_: reached.append(True))
    fit(model, tasks[1].train, steps=1, rate=1e-3, seed=0)
    assert reached == [True]


def test_splits_are_apart_and_complete(tasks: tuple[Task, Task]) -> None:
    for task in tasks:
        splits = [split for split in (task.train, task.validation, task.test) if len(split.labels)]
        for split in splits:
            assert split.images.shape[1:] == (8, 8)
            assert set(split.labels.tolist()) == set(range(5))
        images = torch.cat([split.images for split in splits]).flatten(1)
        assert len(images.unique(dim=0)) == len(images)
    assert sum(len(split.labels) for task in tasks for split in task[1:]) == 1797


def test_an_epoch_shows_every_image_once(tasks: tuple[Task, Task]) -> None:
    split = Split(torch.arange(10.0), torch.arange(10))
    stream = batches(split, 5, torch.Generator().manual_seed(0))
    assert sorted(torch.cat([next(stream).labels for _ in range(2)]).tolist()) == list(range(10))


def test_the_schedule_rises_and_falls() -> None:
    factors = [schedule(step, 50) for step in range(50)]
    assert max(factors) == factors[4] == 1.0
    assert factors[0] > 0
    assert factors[-1] > 0
    assert factors == sorted(factors[:5]) + sorted(factors[5:], reverse=True)


def test_accuracy_is_in_percent() -> None:
    split = Split(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert evaluate(torch.nn.Identity(), split)[0] == 75.0


@pytest.mark.parametrize(
    ("difference", "holds"), [(0.0, True), (9e-5, True), (2e-4, False), (float("nan"), False)], ids=str
)
def test_agreement(difference: float, holds: bool) -> None:
    losses = {REFERENCE: [[0.5, 0.0]], FUSED: [[0.5, difference]]}
    found = report.agreement(losses, "cpu")
    assert found is not None
    assert (found["impl"], found["steps"], found["holds"]) == ("cpu", 2, holds)


def test_curves_that_differ_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "AGREEMENT_LIMIT", -1.0)
    arguments = ["train", *TINY, "--methods", "compacter,compacter-dense", "--out", str(tmp_path), "--no-plot"]
    assert main(arguments) == 1
    assert "NOT THE SAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora"], "'lora' is not known; choose of probe"),
        (["--methods", ","], "a list of names"),
        (["--steps", "0"], "an integer >= 1"),
        (["--seeds", "x"], "an integer >= 1"),
        (["--steps", "1", "--epochs", "1"], "not allowed with"),
        (["--threads", "-1"], "an integer >= 1"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", *arguments])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_out_that_is_a_file_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["train", "--out", str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert error.count("\n") == 1


def test_an_impl_that_cannot_serve_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "not built here")
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    assert main(["train", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "not built here" in error
    assert error.count("\n") == 1


def test_without_the_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "__file__", str(tmp_path / "compacter_kernels" / "train.py"))
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert f"the training scripts are neither in {tmp_path / 'compacter_kernels' / 'examples'} nor in" in error
    assert error.count("\n") == 1


def test_without_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["train", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install scikit-learn" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in (report.missing() or "")
    assert main(["train", *TINY, "--methods", "probe", "--out", str(tmp_path)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "train.json", "losses.csv"}


def test_threads_are_given_back(tmp_path: Path) -> None:
    shortest = [*TINY, "--steps", "1", "--pretraining-steps", "1", "--seeds", "1", "--methods", "probe", "--no-plot"]
    assert main(["train", *shortest, "--out", str(tmp_path), "--threads", "2"]) == 0
    assert torch.get_num_threads() == 1
    assert json.loads((tmp_path / "train.json").read_text())["machine"]["threads"] == 2
