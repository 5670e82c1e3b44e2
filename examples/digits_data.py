"""Handwritten digits, the 1,797 images of scikit-learn, as two tasks of five classes each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BACKGROUND = -1.0


class Split(NamedTuple):
    """Some images of one task, (N, 8, 8) float32 in [-1, 1], and labels (N,) int64 from 0."""

    images: Tensor
    labels: Tensor


class Task(NamedTuple):
    """Digits to tell apart: splits to learn from, to choose learning rates by, and to report."""

    digits: tuple[int, ...]
    train: Split
    validation: Split
    test: Split


def load_tasks() -> tuple[Task, Task]:
    """The task to pretrain on (digits 0 to 4) and the one to adapt to (5 to 9), always the same.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32) / 8 + BACKGROUND
    targets = torch.as_tensor(digits.target, dtype=torch.int64)
    return (
        _divide(images, targets, (0, 1, 2, 3, 4), train=0.8, validation=0.0),
        _divide(images, targets, (5, 6, 7, 8, 9), train=0.5, validation=0.2),
    )


def _divide(images: Tensor, targets: Tensor, digits: tuple[int, ...], train: float, validation: float) -> Task:
    """Split the images of each digit in the same proportions; the rest is the test split."""
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for digit in digits:
        rows = (targets == digit).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        ends = (round(train * len(rows)), round((train + validation) * len(rows)))
        for part, some in zip(parts, rows.tensor_split(ends), strict=True):
            part.append(some)
    chosen = [torch.cat(part) for part in parts]
    return Task(digits, *(Split(images[rows], targets[rows] - digits[0]) for rows in chosen))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images (N, 8, 8), all moved by the same random step of at most one pixel."""
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1), value=BACKGROUND)[:, down : down + 8, right : right + 8]
