"""What a model learns: the class of a text, or to write a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from text_data import classes_of

Batch = dict[str, Any]


class Task(ABC):
    """A task with its tokenizer, which cuts texts off after `max_length` tokens."""

    name: str
    metric: str

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer {type(tokenizer).__name__} has neither a padding nor an end token")

    def encode(self, texts: Dataset) -> Dataset:
        """The examples as the model reads them: input_ids, attention_mask and so on, and labels."""
        return texts.map(self._tokens, batched=True, remove_columns=texts.column_names)

    @abstractmethod
    def load(self, source: str) -> nn.Module:
        """The pretrained model. The values of a head that it lacks are random."""

    @abstractmethod
    def collator(self, model: nn.Module) -> Callable[[list[Batch]], Batch]:
        """What joins examples to a batch: inputs (batch, tokens) and labels, padded."""

    @abstractmethod
    def right(self, model: nn.Module, inputs: Batch, labels: Tensor, logits: Tensor) -> Tensor:
        """For each example of a batch whether the model is right, (batch,) bool."""

    @abstractmethod
    def _tokens(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns of `encode`, for some examples."""


class Classification(Task):
    """One class for a text, or for a pair of texts."""

    name, metric = "classification", "accuracy"

    def __init__(self, tokenizer: Any, max_length: int, classes: Sequence[str]) -> None:
        super().__init__(tokenizer, max_length)
        self.classes = list(classes)

    def load(self, source: str) -> nn.Module:
        """The model with a linear classifier."""
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(self.classes),
            id2label=dict(enumerate(self.classes)),
            label2id={name: number for number, name in enumerate(self.classes)},
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return model

    def collator(self, model: nn.Module) -> Callable[[list[Batch]], Batch]:
        """Labels are (batch,)."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorWithPadding(self.tokenizer)
        return collator

    def right(self, model: nn.Module, inputs: Batch, labels: Tensor, logits: Tensor) -> Tensor:
        """The class with the largest logit is the answer."""
        return logits.argmax(-1) == labels

    def _tokens(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns = [list(column) for column in zip(*batch["texts"], strict=True)]
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        return {**encoded, "labels": [self.classes.index(target) for target in batch["target"]]}


class TextToText(Task):
    """A text from a text. An answer is right if the model, generating greedily, writes the target."""

    name, metric = "text-to-text", "exact match"

    def load(self, source: str) -> nn.Module:
        """The encoder-decoder model."""
        model: nn.Module = AutoModelForSeq2SeqLM.from_pretrained(source)
        return model

    def collator(self, model: nn.Module) -> Callable[[list[Batch]], Batch]:
        """Labels are (batch, tokens), padded with -100, which the loss ignores."""
        pad = DataCollatorForSeq2Seq(self.tokenizer, model=model)
        return lambda examples: {**pad(examples), "use_cache": False}

    def right(self, model: nn.Module, inputs: Batch, labels: Tensor, logits: Tensor) -> Tensor:
        """The model generates as many tokens as the longest target has."""
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        generated = model.generate(**prompt, max_new_tokens=labels.shape[1], num_beams=1, do_sample=False)  # type: ignore[operator]
        targets = labels.masked_fill(labels < 0, self.tokenizer.pad_token_id)
        written, expected = (self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (generated, targets))
        matches = [answer.strip() == target.strip() for answer, target in zip(written, expected, strict=True)]
        return torch.tensor(matches, device=labels.device)

    def _tokens(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = [" ".join(parts) for parts in batch["texts"]]
        inputs = self.tokenizer(joined, truncation=True, max_length=self.max_length)
        targets = self.tokenizer(text_target=batch["target"], truncation=True, max_length=self.max_length)
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return {**kept, "labels": targets["input_ids"]}


def open_task(source: str, name: str | None, data: Sequence[Dataset], max_length: int) -> Task:
    """The task of that name; by default text-to-text for a model that has a decoder.

    Raises:
        ValueError, OSError: the source is no model, lacks a tokenizer, or does not fit the task.
    """
    _check_source(source)
    config = AutoConfig.from_pretrained(source)
    name = name or (TextToText.name if config.is_encoder_decoder else Classification.name)
    if name == TextToText.name and not config.is_encoder_decoder:
        raise ValueError(
            f"--task {name} takes an encoder-decoder model such as T5, and {source} is a {config.model_type}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ValueError(f"--model {source} has no tokenizer that can be loaded: {error}") from error
    if name == TextToText.name:
        return TextToText(tokenizer, max_length)
    return Classification(tokenizer, max_length, classes_of(*data))


def _check_source(source: str) -> None:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {source} is no folder of a transformers model: it has no config.json")
    if path.is_file() or (not path.exists() and (source.count("/") > 1 or source.startswith(("/", ".", "~")))):
        raise FileNotFoundError(
            f"--model {source} is no folder; give that of a transformers model, or an id of the hub"
        )
