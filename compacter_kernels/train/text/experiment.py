"""One run: a model, a method and a seed, trained from the start or from its checkpoint, evaluated and saved."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compacter_kernels.checkpoints.files import read_json
from compacter_kernels.train.text import checkpoint
from compacter_kernels.train.text.data import Split, Texts
from compacter_kernels.train.text.loop import Recipe, Training
from compacter_kernels.train.text.methods import Method, trained
from compacter_kernels.train.text.processes import Processes
from compacter_kernels.train.text.task import Classification, Example, Task, TextToText, classes_of

TASKS = (Classification.name, TextToText.name)
RESULT, ADAPTER, MODEL = "result.json", "adapter", "model"


@dataclass(frozen=True)
class Subject:
    """What is adapted to what, and how: a pretrained model, a task, a method with the options of its adapters."""

    source: str
    task: Task
    method: Method
    options: dict[str, Any]

    def build(self, seed: int, device: torch.device) -> nn.Module:
        """The pretrained model with what the method adds to it; the same for the same seed."""
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model = self.task.load(self.source).float()  # whatever the checkpoint has: AdamW's steps are below bf16
            self.method.prepare(model, self.options)
        return model.to(device)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers does not say that a head is new, which it always is."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def open_task(source: str, name: str | None, split: Split, max_length: int) -> Task:
    """The task of that name, by default text-to-text of a model that has a decoder beside its encoder.

    Raises:
        ValueError, OSError: the source is no model, lacks a tokenizer, or is not for that task.
    """
    _check_source(source)
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    if name is None:
        name = TextToText.name if config.is_encoder_decoder else Classification.name
    if name == TextToText.name and not config.is_encoder_decoder:
        raise ValueError(
            f"--task {name} takes an encoder-decoder model such as T5, and {source} is a {config.model_type}"
        )
    load: Any = AutoTokenizer.from_pretrained
    try:
        tokenizer = load(source)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ValueError(f"--model {source} has no tokenizer that can be loaded: {error}") from error
    if name == TextToText.name:
        return TextToText(tokenizer, max_length)
    return Classification(tokenizer, max_length, classes_of(*split))


def _check_source(source: str) -> None:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {source} is no folder of a transformers model: it has no config.json")
    if path.is_file() or (not path.exists() and (source.count("/") > 1 or source.startswith(("/", ".", "~")))):
        raise FileNotFoundError(
            f"--model {source} is no folder; give that of a transformers model, or an id of the hub"
        )


def encode(task: Task, texts: Texts) -> list[Example]:
    """The examples as numbers."""
    with quiet():
        return task.encode(texts)


def evaluate(training: Training, examples: list[Example]) -> dict[str, float]:
    """Mean loss of a label, and the part of the examples that are right, over all processes."""
    processes, batch = training.processes, max(1, training.recipe.batch // training.processes.size)
    own = examples[processes.rank :: processes.size]
    loss, labels, right, count = processes.total(
        training.task.evaluate(training.model, own, processes.device, batch)
    ).tolist()
    return {"loss": loss / labels, training.task.metric: right / count}


def train(
    subject: Subject,
    data: tuple[list[Example], list[Example]],
    recipe: Recipe,
    processes: Processes,
    folder: Path,
    settings: dict[str, Any],
    *,
    save_every: int,
    advance: Callable[[int], object] = lambda steps: None,
) -> dict[str, Any]:
    """Train with one seed and write adapter and result into the folder; a checkpoint there is taken up, a result kept.

    advance: called with the number of steps that were made, or that were made already.
    """
    settings = {**settings, **asdict(recipe)}
    if (folder / RESULT).is_file():
        result = read_json(folder / RESULT)
        checkpoint.check_settings(result.get("settings"), settings, folder / RESULT)
        advance(recipe.steps)
        return result
    examples, validation = data
    training = Training(subject.build(recipe.seed, processes.device), subject.task, examples, recipe, processes)
    found = checkpoint.latest(folder)
    if found is not None:
        checkpoint.load(training, subject.method, found, settings)
        advance(training.step)
    while training.step < recipe.steps:
        training.advance()
        advance(1)
        if training.step % save_every == 0 and training.step < recipe.steps:
            checkpoint.save(training, subject.method, folder, settings)
    result = {
        "seed": recipe.seed,
        "step": training.step,
        "train_loss": training.losses[-1],
        **evaluate(training, validation),
        **sizes(training.model),
        "seconds": training.seconds,
        "settings": settings,
    }
    if processes.first:
        _write(subject, training, folder, result)
    processes.wait()
    return result


def _write(subject: Subject, training: Training, folder: Path, result: dict[str, Any]) -> None:
    """The adapter, of full fine-tuning the model, and as the last the result; then the checkpoints go."""
    folder.mkdir(parents=True, exist_ok=True)
    if subject.method.name == "full":
        training.model.save_pretrained(folder / MODEL)  # type: ignore[operator]
        subject.task.tokenizer.save_pretrained(folder / MODEL)
    else:
        subject.method.save(training.model, folder / ADAPTER)
    losses = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(training.losses, 1))
    (folder / "losses.csv").write_text(f"step,loss\n{losses}", encoding="utf-8")
    checkpoint.write_json(result, folder / RESULT)
    for path in folder.glob(f"{checkpoint.PREFIX}*"):
        shutil.rmtree(path)


def sizes(model: nn.Module) -> dict[str, int]:
    """How many numbers train, and how many the model has with all that the method added."""
    counts = {"trainable_parameters": sum(p.numel() for p in trained(model).values())}
    return {**counts, "parameters": sum(p.numel() for p in model.parameters())}
