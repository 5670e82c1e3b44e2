"""A killed run resumes to the same bits. Two processes train as one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_text import rows, save_model, save_rows
from two_processes import run_command

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from adapter_trainer import AdapterTrainer
from compacter_kernels.cli import main

FILES = {"compacter": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}
STEPS = 20


def arguments(folder: Path, method: str, out: str | Path, *more: str) -> list[str]:
    adapters = ["--reduction-factor", "4"] if method == "compacter" else []
    data = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--out", str(folder / out)]
    run = ["--method", method, "--steps", str(STEPS), "--batch", "8", "--threads", "1", "--save-every", "5"]
    return ["train", *data, *run, *adapters, *more]


def prepare(folder: Path, kind: str, dropout: bool) -> None:
    save_model(folder / "model", kind, dropout)
    save_rows(folder / "data.jsonl", rows(48))


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=environment)


def kill_after_a_checkpoint(command: list[str], folder: Path) -> None:
    """Kill the process, or the first of those that torchrun has started."""
    process = start(command)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*/settings.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    worker = next(iter(psutil.Process(process.pid).children()), psutil.Process(process.pid))
    worker.kill()
    process.communicate()
    assert process.returncode != 0
    assert not (folder / "result.json").exists()


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "compacter_kernels"]


def assert_same_bits(folder: Path, seed: str, method: str) -> None:
    whole, again = (folder / name / seed for name in ("whole", "broken"))
    assert (again / "losses.csv").read_text() == (whole / "losses.csv").read_text()
    assert (again / FILES[method]).read_bytes() == (whole / FILES[method]).read_bytes()
    assert {path.name for path in again.iterdir()} == {path.name for path in whole.iterdir()}


def stop(command: list[str]) -> None:
    """Interrupt the command in step 13, two steps after its second checkpoint."""
    step = AdapterTrainer.training_step

    def interrupted(trainer: AdapterTrainer, *args: Any) -> torch.Tensor:
        if trainer.state.global_step == 12:
            raise KeyboardInterrupt
        return step(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", interrupted)
        assert main(command) == 130


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """The run has dropout and two seeds, and is killed during the first."""
    prepare(tmp_path, "bert", dropout=True)
    assert main(arguments(tmp_path, "compacter", "whole", "--seeds", "2")) == 0
    broken = arguments(tmp_path, "compacter", "broken", "--seeds", "2")
    kill_after_a_checkpoint(["-m", "compacter_kernels", *broken], tmp_path / "broken" / "seed-0")
    assert main([*broken, "--resume"]) == 0
    for seed in ("seed-0", "seed-1"):
        assert_same_bits(tmp_path, seed, "compacter")


@pytest.mark.slow
def test_the_whole_model_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """The run has dropout and accumulated batches."""
    prepare(tmp_path, "t5", dropout=True)
    assert main(arguments(tmp_path, "full", "whole", "--accumulate", "2")) == 0
    broken = arguments(tmp_path, "full", "broken", "--accumulate", "2")
    stop(broken)
    assert main([*broken, "--resume"]) == 0
    assert_same_bits(tmp_path, "seed-0", "full")


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("stopped")
    prepare(folder, "bert", dropout=False)
    stop(arguments(folder, "compacter", "out"))
    return folder


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run for one test."""
    shutil.copytree(stopped_run / "out", tmp_path / "out")
    return stopped_run


def test_a_checkpoint_holds_the_adapter_and_not_the_model(stopped_run: Path) -> None:
    (checkpoint,) = (stopped_run / "out" / "seed-0").iterdir()
    assert checkpoint.name == "checkpoint-10"
    weights = {path.name for path in checkpoint.iterdir() if path.suffix == ".safetensors"}
    assert weights == {"adapter_model.safetensors"}
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 200_000


def test_a_run_is_not_overwritten(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(stopped, "compacter", tmp_path / "out")) == 2
    assert "has a run already (seed-0); --resume goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning-rate", "0.5"], "other settings: rate was 0.003 and is 0.5"),
        (["--batch", "4"], "other settings: batch was 8 and is 4"),
        (["--phm-dim", "2"], "adapters was {'reduction_factor': 4.0} and is"),
        (["--phm-rank", "2"], "adapters was {'reduction_factor': 4.0} and is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_settings_are_refused(
    more: list[str], message: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(stopped, "compacter", tmp_path / "out"), "--resume", *more]) == 2
    assert message in capsys.readouterr().err


def test_other_data_is_refused(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_rows(stopped / "data.jsonl", rows(48, seed=1))
    try:
        assert main([*arguments(stopped, "compacter", tmp_path / "out"), "--resume"]) == 2
    finally:
        save_rows(stopped / "data.jsonl", rows(48))
    assert "data_sha256 was" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_refused(
    name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "seed-0" / "checkpoint-10" / name
    path.write_bytes(path.read_bytes()[:-100])
    assert main([*arguments(stopped, "compacter", tmp_path / "out"), "--resume"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_is_not_complete_is_passed_over(stopped: Path, tmp_path: Path) -> None:
    """A process that is killed while it writes a checkpoint leaves it without settings."""
    folder = tmp_path / "out" / "seed-0"
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-15", ignore=shutil.ignore_patterns("settings.json"))
    assert main([*arguments(stopped, "compacter", tmp_path / "out"), "--resume"]) == 0
    assert len((folder / "losses.csv").read_text().splitlines()) == STEPS + 1


def test_a_finished_run_is_reported_again(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments(stopped, "compacter", tmp_path / "out"), "--resume", "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    result = tmp_path / "out" / "seed-0" / "result.json"
    written = result.stat().st_mtime_ns
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["results"] == first["results"]
    assert result.stat().st_mtime_ns == written


def test_resume_without_a_run_starts_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, "bert", dropout=False)
    assert main([*arguments(tmp_path, "compacter", "out"), "--resume", "--steps", "2"]) == 0
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), [("bert", "compacter"), ("t5", "full")])
def test_two_processes_train_as_one(kind: str, method: str, tmp_path: Path) -> None:
    """For T5 the parts of the processes have different numbers of target tokens."""
    prepare(tmp_path, kind, dropout=False)
    assert main(arguments(tmp_path, method, "one", "--accumulate", "2")) == 0
    printed = run_command(arguments(tmp_path, method, "two", "--accumulate", "2"), tmp_path / "printed")
    assert printed.count("written into") == 1
    one, two = (tmp_path / name / "seed-0" for name in ("one", "two"))
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for key in ("loss", "train_loss", "exact match" if kind == "t5" else "accuracy"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-3)
    losses = [[float(line.split(",")[1]) for line in (f / "losses.csv").read_text().split()[1:]] for f in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    expected, got = (load_file(folder / FILES[method]) for folder in (one, two))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """The run has dropout. Each process restores its own random state."""
    prepare(tmp_path, "bert", dropout=True)
    run_command(arguments(tmp_path, "compacter", "whole"), tmp_path / "printed")
    broken = arguments(tmp_path, "compacter", "broken")
    kill_after_a_checkpoint([*TORCHRUN, *broken], tmp_path / "broken" / "seed-0")
    run_command([*broken, "--resume"], tmp_path / "printed again")
    assert_same_bits(tmp_path, "seed-0", "compacter")
