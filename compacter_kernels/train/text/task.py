"""What is learnt: the class of a text, or a text from a text; how it is encoded, what the loss is and what is right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compacter_kernels.train.text.data import Texts

IGNORED = -100


class Example(NamedTuple):
    """One example as numbers: the model's inputs by name, and the class or the tokens to predict."""

    inputs: dict[str, list[int]]
    labels: list[int]


class Task(ABC):
    """A task with its tokenizer. Subclasses say what the model, the target and a right answer are."""

    name: str
    metric: str
    padding: dict[str, int]

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer {type(tokenizer).__name__} has neither a padding nor an end token")
        self.padding = {"input_ids": tokenizer.pad_token_id}

    @abstractmethod
    def load(self, source: str) -> nn.Module:
        """The pretrained model; a head that it lacks is drawn from torch's generator."""

    @abstractmethod
    def encode(self, texts: Texts) -> list[Example]:
        """The examples as numbers, cut off after max_length tokens."""

    @abstractmethod
    def scores(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The model's logits, (labels.numel(), classes or words)."""

    @abstractmethod
    def right(self, model: nn.Module, examples: Sequence[Example], logits: Tensor) -> int:
        """How many of the examples, of which these are the logits, the model has right."""

    def collate(self, examples: Sequence[Example], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs, each (batch, tokens), and labels (batch, labels), padded."""

        def padded(rows: list[list[int]], value: int) -> Tensor:
            width = max(map(len, rows))
            return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

        names = examples[0].inputs
        inputs = {name: padded([e.inputs[name] for e in examples], self.padding.get(name, 0)) for name in names}
        return inputs, padded([e.labels for e in examples], IGNORED)

    def loss(self, model: nn.Module, examples: Sequence[Example], device: torch.device) -> Tensor:
        """The sum of the losses of all labels."""
        inputs, labels = self.collate(examples, device)
        return _total(self.scores(model, inputs, labels), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: Sequence[Example], device: torch.device, batch: int) -> Tensor:
        """Sums over the examples: loss, labels, right answers, examples; (4,) float64."""
        training = model.training
        model.eval()
        total = torch.zeros(4, dtype=torch.float64)
        examples = sorted(examples, key=length)  # so that little is padding
        for start in range(0, len(examples), batch):
            some = examples[start : start + batch]
            inputs, labels = self.collate(some, device)
            logits = self.scores(model, inputs, labels)
            sums = (_total(logits, labels).item(), weight(some), self.right(model, some, logits), len(some))
            total += torch.tensor(sums, dtype=torch.float64)
        model.train(training)
        return total


def length(example: Example) -> int:
    """How many tokens the model reads."""
    return len(example.inputs["input_ids"])


def weight(examples: Iterable[Example]) -> int:
    """How many labels they have: what a sum of losses is divided by."""
    return sum(len(example.labels) for example in examples)


def _total(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


class Classification(Task):
    """One class for a text, or for a pair of texts."""

    name, metric = "classification", "accuracy"

    def __init__(self, tokenizer: Any, max_length: int, classes: Sequence[str]) -> None:
        super().__init__(tokenizer, max_length)
        self.classes = list(classes)

    def load(self, source: str) -> nn.Module:
        """The model with a linear classifier, by `AutoModelForSequenceClassification`."""
        from transformers import AutoModelForSequenceClassification

        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(self.classes),
            id2label=dict(enumerate(self.classes)),
            label2id={name: number for number, name in enumerate(self.classes)},
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return model

    def encode(self, texts: Texts) -> list[Example]:
        """Text pairs as the tokenizer joins them."""
        columns = [list(column) for column in zip(*texts.inputs, strict=True)]
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        numbers = {name: number for number, name in enumerate(self.classes)}
        return [
            Example({name: encoded[name][row] for name in encoded}, [numbers[target]])
            for row, target in enumerate(texts.targets)
        ]

    def scores(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """(batch, classes)."""
        logits: Tensor = model(**inputs).logits
        return logits

    def right(self, model: nn.Module, examples: Sequence[Example], logits: Tensor) -> int:
        """By the largest logit."""
        labels = torch.tensor([example.labels[0] for example in examples], device=logits.device)
        return int((logits.argmax(-1) == labels).sum())


class TextToText(Task):
    """A text from a text; right is one that is generated, greedily, as the tokenizer writes the target."""

    name, metric = "text-to-text", "exact match"

    def load(self, source: str) -> nn.Module:
        """The model, by `AutoModelForSeq2SeqLM`."""
        from transformers import AutoModelForSeq2SeqLM

        model: nn.Module = AutoModelForSeq2SeqLM.from_pretrained(source)
        return model

    def encode(self, texts: Texts) -> list[Example]:
        """Several texts as one, a space between them."""
        joined = [" ".join(parts) for parts in texts.inputs]
        inputs = self.tokenizer(joined, truncation=True, max_length=self.max_length)
        targets = self.tokenizer(text_target=texts.targets, truncation=True, max_length=self.max_length)["input_ids"]
        kept = [name for name in ("input_ids", "attention_mask") if name in inputs]
        return [Example({name: inputs[name][row] for name in kept}, target) for row, target in enumerate(targets)]

    def scores(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """(batch * target tokens, words)."""
        own: Any = getattr(model, "module", model)  # within DistributedDataParallel
        shifted = own.prepare_decoder_input_ids_from_labels(labels)
        logits: Tensor = model(**inputs, decoder_input_ids=shifted, use_cache=False).logits
        return logits.flatten(0, 1)

    def right(self, model: nn.Module, examples: Sequence[Example], logits: Tensor) -> int:
        """Generates as many tokens as the longest target has."""
        inputs, _ = self.collate(examples, logits.device)
        targets = [example.labels for example in examples]
        found = model.generate(**inputs, max_new_tokens=max(map(len, targets)), num_beams=1, do_sample=False)  # type: ignore[operator]
        written, expected = (self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (found, targets))
        return sum(ours.strip() == theirs.strip() for ours, theirs in zip(written, expected, strict=True))


def classes_of(train: Texts, validation: Texts) -> list[str]:
    """The labels, in order.

    Raises:
        ValueError: fewer than two, or one that is not trained on.
    """
    found = sorted(set(train.targets), key=lambda name: (int(name), name) if name.isdecimal() else (-1, name))
    if len(found) < 2:
        raise ValueError(f"a classification takes two labels or more; the data has {', '.join(map(repr, found))} alone")
    unknown = sorted(set(validation.targets) - set(found))
    if unknown:
        raise ValueError(f"the validation data has labels that the training data lacks: {', '.join(unknown[:8])}")
    return found
