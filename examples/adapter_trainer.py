"""Hugging Face's Trainer for adapters.

It differs from `transformers.Trainer` in four ways. Checkpoints hold the parameters that train, and
not the whole model. A resumed run ends with the same bits as one that was not interrupted. The loss
is the mean over the labels of a step, however the batch is divided. And every loss is logged with
all its digits.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from text_methods import Method
from text_task import Batch, Classification
from train_common import schedule, write_json

IGNORED = -100  # a label that is padding
SETTINGS = "settings.json"
STATES = ("optimizer.pt", "scheduler.pt")


class Arguments(TrainingArguments):
    """The options of Trainer. A CPU has no number here, which torch.load would not understand."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device("cpu") if super().device.type == "cpu" else super().device


@dataclass(frozen=True)
class Recipe:
    """How to train: `batch` examples a step over all processes, in `accumulate` parts each."""

    steps: int
    rate: float
    batch: int
    seed: int
    accumulate: int = 1
    bf16: bool = False

    def arguments(self, folder: Path, save_every: int | None) -> Arguments:
        """The same in the words of transformers."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        on_gpu = torch.cuda.is_available()
        # transformers leaves the dtype of an earlier run of this process in the environment
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if self.bf16 else "no"
        return Arguments(
            output_dir=str(folder),
            max_steps=self.steps,
            learning_rate=self.rate,
            per_device_train_batch_size=self.batch // (processes * self.accumulate),
            gradient_accumulation_steps=self.accumulate,
            per_device_eval_batch_size=max(1, self.batch // processes),
            bf16=self.bf16,
            seed=self.seed,
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_strategy="no" if save_every is None else "steps",
            save_steps=save_every or self.steps,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,  # AdapterTrainer shows a bar without the lines of the log
            remove_unused_columns=False,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            ddp_find_unused_parameters=False,
        )


class AdapterTrainer(Trainer):
    """A Trainer of one run. `folder` gets a checkpoint every `save_every` steps; None means none.

    settings: they identify the run, and are written into each checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Classification,
        method: Method,
        examples: Dataset,
        recipe: Recipe,
        folder: Path,
        save_every: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.task, self.method = task, method
        self.parts: list[Tensor] = []  # the losses of the parts of this step
        super().__init__(
            model,
            recipe.arguments(folder, save_every),
            data_collator=task.collator(model),
            train_dataset=passes(examples, recipe),
            compute_loss_func=mean_loss,
            compute_metrics=self.metrics,
            callbacks=[Checkpoints(settings or {})],
        )
        self.model_accepts_loss_kwargs = False  # mean_loss computes the loss, and not the model
        self.remove_callback(PrinterCallback)
        if sys.stderr.isatty():
            self.add_callback(Bar)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training data in its own order, since `passes` has shuffled it."""
        examples: Any = self.train_dataset
        loader: DataLoader[Any] = DataLoader(
            examples,
            self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A learning rate that rises and falls as `schedule` says, and is never 0."""
        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(chosen, lambda step: schedule(step, num_training_steps))
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A step of Trainer, whose loss is kept for the log."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.parts.append(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """The log of Trainer, with the loss of the step, which Trainer rounds to four digits."""
        if "loss" in logs:
            logs["loss"] = self.accelerator.reduce(torch.stack(self.parts).sum(), "mean").item()
            self.parts.clear()
        super().log(logs, *args)

    @property
    def losses(self) -> list[float]:
        """The loss of each step so far, also of those before the run was resumed."""
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]

    @property
    def seconds(self) -> float:
        """How long the last call of `train` took."""
        return next(entry["train_runtime"] for entry in self.state.log_history[::-1] if "train_runtime" in entry)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """The sum of losses of each example, its number of labels, and 1 if right; (batch, 3)."""
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
            right = self.task.right(self.model, inputs, labels, logits)
        counts = (labels != IGNORED).view(len(labels), -1).sum(1)
        figures = torch.stack([losses(logits, labels).view(len(labels), -1).sum(1), counts, right], 1)
        return None, figures, figures  # the third would be the labels; Trainer computes no metrics without it

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The mean loss of a label, and the part of the examples that are right."""
        figures: Any = prediction.predictions
        loss, labels, right = figures.astype("float64").sum(0).tolist()
        return {"loss": loss / labels, self.task.metric: right / len(figures)}

    def evaluation(self, examples: Dataset) -> dict[str, float]:
        """The same for these examples, by the names of a result."""
        figures = self.evaluate(examples)
        return {name: figures[f"eval_{name}"] for name in ("loss", self.task.metric)}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that train. All processes call it, and the first writes."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)  # Trainer lets other processes write into it meanwhile
        if self.method.name == "full":
            super().save_model(output_dir, _internal_call)
        elif self.method.compacter or self.args.should_save:
            self.method.save(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the files of `save_model`.

        This is a private method of Trainer. The public ones leave no other way to resume: Trainer
        refuses a checkpoint that holds neither the whole model nor an adapter of peft.
        """
        check(Path(resume_from_checkpoint))
        if self.method.name == "full":
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[no-untyped-call]
        else:
            self.method.load(model or self.model, Path(resume_from_checkpoint))


class Bar(ProgressCallback):
    """The progress bar of transformers, without a line for every step."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing: losses.csv gets the losses."""


class Checkpoints(TrainerCallback):
    """Completes a checkpoint with the settings of its run, and then removes the one before it.

    The settings are written last, when every process has written its part. So a checkpoint that has
    them is complete, and a run that is killed at any time leaves one.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """All processes call it, and the first writes."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            write_json(self.settings, folder / SETTINGS)
            for other in folder.parent.glob("checkpoint-*"):
                if other != folder:
                    shutil.rmtree(other)


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint of a run."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{SETTINGS}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check(checkpoint: Path) -> None:
    """Raise ValueError if a file of a checkpoint is damaged. Trainer would not name the file."""
    for name in STATES:
        try:
            torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise ValueError(f"{checkpoint / name} cannot be read, it is damaged: {error}") from error


def check_settings(before: Any, settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the settings that a file has are those of this run."""
    differ = [name for name in settings if not isinstance(before, dict) or before.get(name) != settings[name]]
    if differ:
        listed = ", ".join(f"{name} was {(before or {}).get(name)!r} and is {settings[name]!r}" for name in differ)
        raise ValueError(f"{path} is of a run with other settings: {listed}; repeat those, or give another --out")


def passes(examples: Dataset, recipe: Recipe) -> Dataset:
    """As many examples as the run takes: pass after pass over the data, each shuffled anew.

    Each step so takes a whole batch, which may end one pass and begin the next. The order follows
    from the seed.
    """
    needed = recipe.steps * recipe.batch
    generators = (
        torch.Generator().manual_seed(recipe.seed * 1_000_003 + turn) for turn in range(-(-needed // len(examples)))
    )
    order = torch.cat([torch.randperm(len(examples), generator=generator) for generator in generators])
    return examples.select(order[:needed].tolist())


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each label, (labels.numel(),), in float32; 0 for an ignored one."""
    scores = logits.float().flatten(0, -2)
    return F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORED, reduction="none")


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The sum of the losses of a part, divided by the number of labels of the whole step."""
    mean: Tensor = losses(outputs.logits, labels).sum() / num_items_in_batch
    return mean
