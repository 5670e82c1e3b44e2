"""What one benchmark run measures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from compacter_kernels.accuracy import Shape

PAGE_FAULTS = ("removed", "kept")


@dataclass(frozen=True)
class Settings:
    """The sweep: every provider on every shape and token count.

    shapes: k/d/n. tokens: rows of x. dtype: of x, by name; the parameters are float32 (float64 with a float64 x).
    providers: names; None means all. threads: of torch; None keeps torch's own number. rounds: timed samples of each
    row; None takes as many as fit into `seconds` per shape and token count, between MIN_ROUNDS and MAX_ROUNDS.
    page_faults: one table for each, see `compacter_kernels.bench.page_faults`.

    device: "cpu" or "cuda". On cuda threads and page_faults mean nothing, and there are two more. compiled_shapes:
    where the providers under torch.compile run, which take a minute for each. limit: seconds for the whole sweep.
    """

    shapes: tuple[Shape, ...] = (Shape(768, 24, 4), Shape(768, 48, 12), Shape(1024, 64, 8), Shape(4096, 128, 8))
    tokens: tuple[int, ...] = (1, 256, 2048, 8192, 32768)
    dtype: str = "float32"
    providers: tuple[str, ...] | None = None
    threads: int | None = None
    rounds: int | None = None
    seconds: float = 4.0
    page_faults: tuple[str, ...] = PAGE_FAULTS
    device: str = "cpu"
    compiled_shapes: tuple[Shape, ...] = ()
    limit: float = 0.0

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        for name in ("shapes", "compiled_shapes"):
            values[name] = tuple(Shape(*shape) for shape in values[name])
        return cls(**values)


MIN_ROUNDS, MAX_ROUNDS = 5, 100
QUICK = Settings(shapes=(Shape(768, 24, 4),), tokens=(1, 2048, 8192), seconds=1.5, page_faults=("removed",))

CUDA = Settings(
    shapes=tuple(
        Shape(*sizes)
        for sizes in ((768, 24, 4), (768, 48, 8), (768, 48, 12), (1024, 64, 8), (4096, 128, 8), (3072, 96, 12))
    ),
    tokens=(1, 256, 2048, 16384, 65536),
    dtype="bfloat16",
    seconds=1.0,
    page_faults=(),
    device="cuda",
    compiled_shapes=(Shape(768, 24, 4), Shape(1024, 64, 8)),
    limit=300.0,
)
CUDA_QUICK = replace(CUDA, shapes=(Shape(768, 24, 4),), tokens=(1, 2048, 16384), compiled_shapes=(), limit=60.0)
