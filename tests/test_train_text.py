"""`train --model`: trained parameters, learning, files, refusals, accumulation, autocast, pairs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import rows, save_model, save_rows

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import datasets

import compacter_kernels as ck
from adapter_trainer import AdapterTrainer, Recipe, passes
from compacter_kernels.cli import main
from compacter_kernels.load import load_adapter
from text_data import load
from text_methods import METHODS, trained
from text_task import open_task
from train_text import build

SMALL = {"reduction_factor": 4}
# datasets closes a CSV file only when it is garbage collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in ("bert", "t5")}


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(save_rows(tmp_path / "data.csv", rows(48)))


def texts(count: int = 48) -> Any:
    examples = rows(count)
    columns = {"texts": [[row["text"]] for row in examples], "target": [row["label"] for row in examples]}
    return datasets.Dataset.from_dict(columns)


def trainer(models: dict[str, Path], kind: str, method: str, folder: Path, **recipe: Any) -> AdapterTrainer:
    """A run of four steps that has not started yet."""
    task = open_task(str(models[kind]), None, (texts(), texts(8)), 32)
    options = {} if method in ("probe", "full") else SMALL
    model = build(str(models[kind]), task, METHODS[method], options, seed=3)
    settings = Recipe(**{"steps": 4, "rate": 1e-2, "batch": 12, "seed": 3, **recipe})
    return AdapterTrainer(model, task, METHODS[method], task.encode(texts()), settings, folder)


def run(model: Path, data: str, out: Path, *more: str) -> int:
    adapters = () if {"probe", "full"} & set(more) else ("--reduction-factor", "4")
    arguments = ["--batch", "12", "--threads", "1", "--out", str(out), *adapters, *more]
    return main(["train", "--model", str(model), "--data", data, *arguments])


@pytest.mark.parametrize(
    ("kind", "method"), [(kind, name) for kind in ("bert", "t5") for name in METHODS if (kind, name) != ("t5", "probe")]
)
def test_only_what_the_method_says_trains(kind: str, method: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Every parameter that trains moves, and no other one does."""
    made = trainer(models, kind, method, tmp_path)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained(made.model))
    head = {name for name in moved if name.startswith("classifier.")}
    norms = {name for name in moved if "norm" in name.lower()}
    if method == "full":
        assert moved == set(before)
    elif method == "probe":
        assert moved == head
    else:
        adapters = {name.partition(".bottleneck")[0] for name in moved if ".bottleneck." in name}
        adapters |= {name.partition(".compacter")[0] for name in moved if ".down." in name and ".compacter." in name}
        blocks = {"bert": 4, "t5": 8}[kind]
        assert len(adapters) == (blocks // 2 if method == "compacter++" else blocks)
        assert norms
        assert bool(head) == (kind == "bert")


@pytest.mark.parametrize("size", [48, 96])
def test_every_pass_shows_every_example_once(size: int) -> None:
    examples = datasets.Dataset.from_dict({"row": range(size)})
    stream = passes(examples, Recipe(24, 1e-3, 20, seed=5))["row"][:]
    assert len(stream) == 480
    for turn in range(480 // size):
        assert sorted(stream[turn * size : (turn + 1) * size]) == list(range(size))
    assert stream[:size] != stream[size : 2 * size]
    assert passes(examples, Recipe(2, 1e-3, 20, seed=6))["row"][:] != stream[:40]
    assert len(passes(examples.select(range(3)), Recipe(1, 1e-3, 20, seed=5))) == 20  # more than there are examples


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_accumulated_batch_is_the_batch(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """The targets of the parts differ in length. The loss is the mean over all labels."""
    whole, parts = (trainer(models, kind, "adapter", tmp_path, accumulate=count) for count in (1, 4))
    whole.train()
    parts.train()
    assert len(whole.losses) == 4
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, p in trained(whole.model).items():
        torch.testing.assert_close(trained(parts.model)[name], p, rtol=1e-3, atol=1e-5)


def test_bf16_stays_near(models: dict[str, Path], tmp_path: Path) -> None:
    """The third run shows that one without bf16 inherits nothing from one with it."""
    made = []
    for bf16 in (False, True, False):
        made.append(trainer(models, "bert", "compacter", tmp_path, bf16=bf16))
        made[-1].train()
    exact, rounded, again = made
    assert again.losses == exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=2e-2)
    assert rounded.losses != exact.losses
    assert {p.dtype for p in trained(rounded.model).values()} == {torch.float32}


def test_the_random_numbers_of_the_caller_are_left_alone(models: dict[str, Path], data: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert run(models["bert"], data, tmp_path / "out", "--steps", "1") == 0
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "rate"), [("bert", "compacter", "0.02"), ("bert", "adapter", "0.02"), ("t5", "full", "0.01")]
)
def test_it_learns(kind: str, method: str, rate: str, models: dict[str, Path], data: str, tmp_path: Path) -> None:
    more = ["--method", method, "--epochs", "40", "--learning-rate", rate, "--validation", data]
    assert run(models[kind], data, tmp_path / "out", *more) == 0
    document = json.loads((tmp_path / "out" / "train.json").read_text())
    assert document["results"][0]["exact match" if kind == "t5" else "accuracy"] > 0.9


def test_what_is_written(
    models: dict[str, Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter of one seed, loaded again, computes the same as the trained one."""
    out = tmp_path / "new" / "out"
    assert run(models["bert"], data, out, "--steps", "5", "--seeds", "2", "--seed", "4") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Compacter" in printed.out
    assert {path.name for path in out.iterdir()} == {"train.json", "train.csv", "train.txt", "seed-4", "seed-5"}
    document = json.loads((out / "train.json").read_text())
    assert [result["seed"] for result in document["results"]] == [4, 5]
    assert document["examples"] == {"train": 43, "validation": 5}
    with (out / "train.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["method"] == "Compacter"
    assert float(row["mean"]) == pytest.approx(50 * sum(r["accuracy"] for r in document["results"]))
    assert len((out / "seed-5" / "losses.csv").read_text().splitlines()) == 6
    assert {path.name for path in (out / "seed-5").iterdir()} == {"adapter", "losses.csv", "result.json"}

    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    again = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=2)
    load_adapter(again, out / "seed-5" / "adapter")
    train, validation = load(data)
    task = open_task(str(models["bert"]), None, (train, validation), 32)
    recipe = Recipe(1, 1e-3, 12, seed=0)
    figures = AdapterTrainer(again, task, METHODS["compacter"], task.encode(train), recipe, tmp_path).evaluation(
        task.encode(validation)
    )
    assert figures == {name: pytest.approx(document["results"][1][name], rel=1e-6) for name in ("loss", "accuracy")}
    assert ck.count_parameters(again).trainable == document["results"][1]["trainable_parameters"]


@pytest.mark.parametrize(
    ("method", "file"), [("full", "model/model.safetensors"), ("adapter", "adapter/trained.safetensors")]
)
def test_what_other_methods_write(
    method: str, file: str, models: dict[str, Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--method", method, "--steps", "2", "--json", "--task", "text-to-text"]
    assert run(models["t5"], data, tmp_path / "out", *more) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "train.json").read_text())
    assert (tmp_path / "out" / "seed-0" / file).is_file()
    assert document["results"][0].keys() >= {"loss", "exact match", "trainable_parameters"}


def test_pairs_of_texts(models: dict[str, Path], tmp_path: Path) -> None:
    pairs = [{"a": row["text"], "b": "w1", "label": row["label"]} for row in rows(24)]
    data = str(save_rows(tmp_path / "pairs.jsonl", pairs))
    for kind in ("bert", "t5"):
        assert run(models[kind], data, tmp_path / kind, "--steps", "1", "--text-column", "a,b") == 0


REFUSED = [
    (["--model", "{bert}"], "--model needs --data"),
    (["--data", "{data}"], "--data belongs to --model, and this is the digits demonstration"),
    (["--batch", "4"], "--batch belongs to --demo topics and to --model, and this is the digits demonstration"),
    (["--demo", "topics", "--resume"], "--resume belongs to --model, and this is --demo topics"),
    (["--demo", "topics", "--quick"], "--quick belongs to the digits demonstration, and this is --demo topics"),
    (["--model", "{bert}", "--data", "{data}", "--quick"], "--quick belongs to the digits demonstration"),
    (["--model", "{bert}", "--data", "{data}", "--methods", "full"], "--methods belongs to the digits demonstration"),
    (["--model", "{bert}", "--data", "{data}", "--demo", "topics"], "give --demo or --model, not both"),
    (["--model", "{bert}", "--data", "{data}", "--text-column", "words"], "no column 'words'; set --text-column"),
    (["--model", "{bert}", "--data", "{data}", "--label-column", "y"], "no column 'y'; set --label-column to one of"),
    (["--model", "{folder}", "--data", "{data}"], "is no folder of a transformers model: it has no config.json"),
    (["--model", "{folder}/none", "--data", "{data}"], "/none is no folder; give that of a transformers model"),
    (["--model", "{bert}", "--data", "{data}", "--task", "text-to-text"], "takes an encoder-decoder model such as T5"),
    (["--model", "{t5}", "--data", "{data}", "--method", "probe"], "--method probe trains a head"),
    (["--model", "{bert}", "--data", "{data}", "--phm-dim", "5"], "phm_dim=5 does not divide hidden_size=32"),
    (["--model", "{bert}", "--data", "{data}", "--batch", "7", "--accumulate", "2"], "--batch 7 must be a multiple"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused_in_one_line(
    arguments: list[str],
    message: str,
    models: dict[str, Path],
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    names = {**models, "data": data, "folder": tmp_path / "folder"}
    out = tmp_path / "out"
    assert main(["train", *(part.format(**names) for part in arguments), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(out.glob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora"], "invalid choice: 'lora'"),
        (["--learning-rate", "0"], "a number > 0"),
        (["--learning-rate", "nan"], "a number > 0"),
        (["--seed", "-1"], "an integer >= 0"),
        (["--task", "regression"], "invalid choice: 'regression'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_without_tokenizer(
    models: dict[str, Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((models["bert"] / name).read_bytes())
    assert run(tmp_path / "bare", data, tmp_path / "out") == 2
    assert "has no tokenizer that can be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "datasets", "accelerate"])
def test_without_a_package(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [name for name in sys.modules if name.partition(".")[0] == package]
    for name in (*absent, package):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("text_data", "text_task", "adapter_trainer", "train_text"):  # so that it is imported again
        monkeypatch.delitem(sys.modules, name)
    assert run(tmp_path, "data.csv", tmp_path / "out", "--steps", "1") == 2
    error = capsys.readouterr().err
    assert f"pip install {package}" in error
    assert error.count("\n") == 1


def test_the_script_by_hand(
    models: dict[str, Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It behaves as the command. Its help and its errors name the script."""
    from train_options import run_script
    from train_text import add_options, run

    arguments = ["--model", str(models["bert"]), "--out", str(tmp_path / "out"), "--reduction-factor", "4"]
    monkeypatch.setattr(sys, "argv", ["train_text.py", *arguments, "--data", data, "--steps", "1"])
    assert run_script("help", add_options, run) == 0
    assert (tmp_path / "out" / "seed-0" / "adapter").is_dir()
    monkeypatch.setattr(sys, "argv", ["train_text.py", *arguments, "--data", "none.csv", "--resume"])
    assert run_script("help", add_options, run) == 2
