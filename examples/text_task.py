"""The tasks that a model learns: to tell the class of a text, or to write a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, logging as datasets_logging
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)
from transformers.utils import logging

from text_data import classes_of

Batch = dict[str, Any]


class Classification:
    """One class for a text, or for a pair of texts, cut off after `max_length` tokens."""

    name, metric = "classification", "accuracy"

    def __init__(self, tokenizer: Any, max_length: int, classes: Sequence[str] = ()) -> None:
        self.tokenizer, self.max_length, self.classes = tokenizer, max_length, list(classes)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer {type(tokenizer).__name__} has neither a padding nor an end token")

    def load(self, source: str) -> nn.Module:
        """The pretrained model with a linear classifier, whose values are random if it is new."""
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(self.classes),
            id2label=dict(enumerate(self.classes)),
            label2id={name: number for number, name in enumerate(self.classes)},
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return model

    def encode(self, texts: Dataset) -> Dataset:
        """The examples as the model reads them: input_ids, attention_mask and so on, and labels."""
        return texts.map(self.tokens, batched=True, remove_columns=texts.column_names)

    def tokens(self, batch: Batch) -> Batch:
        """The columns of `encode`, for some examples."""
        columns = [list(column) for column in zip(*batch["texts"], strict=True)]
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        return {**encoded, "labels": [self.classes.index(target) for target in batch["target"]]}

    def collator(self, model: nn.Module) -> Callable[[list[Batch]], Batch]:
        """A function that joins examples to padded inputs (batch, tokens) and labels (batch,)."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorWithPadding(self.tokenizer)
        return collator

    def right(self, model: Any, inputs: Batch, labels: Tensor, logits: Tensor) -> Tensor:
        """Whether the model is right, (batch,) bool: its answer is the largest logit."""
        return logits.argmax(-1) == labels


class TextToText(Classification):
    """A text from a text. An answer is right if the model greedily generates the target."""

    name, metric = "text-to-text", "exact match"

    def load(self, source: str) -> nn.Module:
        """The pretrained encoder-decoder model."""
        model: nn.Module = AutoModelForSeq2SeqLM.from_pretrained(source)
        return model

    def tokens(self, batch: Batch) -> Batch:
        """Several texts become one, with a space between them."""
        joined = [" ".join(parts) for parts in batch["texts"]]
        inputs = self.tokenizer(joined, truncation=True, max_length=self.max_length)
        targets = self.tokenizer(text_target=batch["target"], truncation=True, max_length=self.max_length)
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return {**kept, "labels": targets["input_ids"]}

    def collator(self, model: nn.Module) -> Callable[[list[Batch]], Batch]:
        """Labels are (batch, tokens), padded with -100, which the loss ignores."""
        pad = DataCollatorForSeq2Seq(self.tokenizer, model=model)
        return lambda examples: {**pad(examples), "use_cache": False}

    def right(self, model: Any, inputs: Batch, labels: Tensor, logits: Tensor) -> Tensor:
        """The model generates as many tokens as the longest target has."""
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        generated = model.generate(**prompt, max_new_tokens=labels.shape[1], num_beams=1, do_sample=False)
        targets = labels.masked_fill(labels < 0, self.tokenizer.pad_token_id)
        written, expected = (self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (generated, targets))
        matches = [answer.strip() == target.strip() for answer, target in zip(written, expected, strict=True)]
        return torch.tensor(matches, device=labels.device)


def quiet() -> None:
    """Silence the libraries, which would print a line for each new head and each file."""
    logging.set_verbosity_error()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    disable_progress_bars()


def open_task(source: str, name: str | None, data: Sequence[Dataset], max_length: int) -> Classification:
    """The task of that name; by default text-to-text for a model that has a decoder.

    Raises:
        ValueError, OSError: the source is no model, lacks a tokenizer, or does not fit the task.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {source} is no folder of a transformers model: it has no config.json")
    if path.is_file() or (not path.exists() and (source.count("/") > 1 or source.startswith(("/", ".", "~")))):
        raise FileNotFoundError(
            f"--model {source} is no folder; give that of a transformers model, or an id of the hub"
        )
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
