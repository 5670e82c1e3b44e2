"""The settings of one benchmark run, and their defaults for each device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from compacter_kernels.cases import Shape

PAGE_FAULTS = ("removed", "kept")
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclass(frozen=True)
class Settings:
    """The sweep times every provider on every shape and token count.

    shapes: k/d/n. tokens: rows of x. dtype: of x, by name; the parameters are float32 (float64 with
    a float64 x). providers: names; None means all. rounds: timed samples of each row; None takes as
    many as fit into `seconds` per shape and token count, between MIN_ROUNDS and MAX_ROUNDS.

    On the CPU, threads: of torch; None keeps torch's own number. page_faults: one table is measured
    for each. On CUDA, compiled_shapes: where the providers under torch.compile run, which take a
    minute for each; on the CPU they run everywhere. limit: seconds for the whole sweep. peers:
    whether modules of other packages are timed too (peers.py).
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
    peers: bool = False

    def to_json(self) -> str:
        """Return the settings as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Return the settings that `to_json` wrote."""
        given = json.loads(text).items()
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
        for name in ("shapes", "compiled_shapes"):
            values[name] = tuple(Shape(*shape) for shape in values[name])
        return cls(**values)


CPU = Settings()
CPU_QUICK = Settings(shapes=(Shape(768, 24, 4),), tokens=(1, 2048, 8192), seconds=1.5, page_faults=("removed",))
CUDA = Settings(
    shapes=(*CPU.shapes[:1], Shape(768, 48, 8), *CPU.shapes[1:], Shape(3072, 96, 12)),
    tokens=(1, 256, 2048, 16384, 65536),
    dtype="bfloat16",
    seconds=1.0,
    page_faults=(),
    device="cuda",
    compiled_shapes=(Shape(768, 24, 4), Shape(1024, 64, 8)),
    limit=300.0,
)
CUDA_QUICK = replace(CUDA, shapes=CUDA.shapes[:1], tokens=(1, 2048, 16384), compiled_shapes=(), limit=60.0)
DEFAULTS = {("cpu", False): CPU, ("cpu", True): CPU_QUICK, ("cuda", False): CUDA, ("cuda", True): CUDA_QUICK}
