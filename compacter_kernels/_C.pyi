"""The native module (csrc/bindings*.cpp). Addresses are integers, 0 for a tensor that is absent."""

from collections.abc import Sequence
from typing import Any

Shape = tuple[int, int, int, int, bool]  # n, rank, in, out, has bias
Address = int

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...

class Tensors:
    """What tensors are, as bytes, and where they lie; None where DLPack does not describe one of them."""

    def __init__(self, kind: type, api: object) -> None: ...
    def signature(self, tensors: tuple[Any, ...]) -> bytes | None: ...
    def addresses(self, tensors: tuple[Any, ...]) -> tuple[Address, ...] | None: ...

class Linear:
    def __init__(self, dtype: int, shape: Shape, dtypes: Sequence[int]) -> None: ...
    def forward(self, x: Address, out: Address, tokens: int, threads: int, params: tuple[Address, ...]) -> None: ...
    def backward(
        self, x: Address, grad: Address, grad_x: Address, tokens: int, threads: int, params: tuple[Address, ...]
    ) -> None: ...

class Adapter:
    def __init__(self, dtype: int, activation: int, down: Shape, up: Shape, dtypes: Sequence[int]) -> None: ...
    def forward(
        self,
        x: Address,
        residual: Address,
        out: Address,
        add_x: bool,
        tokens: int,
        scale: float,
        threads: int,
        params: tuple[Address, ...],
    ) -> None: ...
    def backward(
        self,
        x: Address,
        grad: Address,
        grad_x: Address,
        add_x: bool,
        tokens: int,
        scale: float,
        threads: int,
        params: tuple[Address, ...],
    ) -> None: ...
    def forward_normed(
        self,
        x: Address,
        residual: Address,
        out: Address,
        add_x: bool,
        tokens: int,
        scale: float,
        norm: tuple[Address, ...],  # weight, bias, rows
        eps: float,
        threads: int,
        params: tuple[Address, ...],
    ) -> None: ...
    def backward_normed(
        self,
        x: Address,
        grad: Address,
        grad_x: Address,
        add_x: bool,
        tokens: int,
        scale: float,
        norm: tuple[Address, ...],  # weight, rows, grad_rows
        eps: float,
        threads: int,
        params: tuple[Address, ...],
    ) -> None: ...

class CudaLinear:
    """multiprocessors, shared_limit, shared_per_multiprocessor, capability: as csrc/cuda/launch.h has them."""

    def __init__(
        self,
        dtype: int,
        shape: Shape,
        dtypes: Sequence[int],
        multiprocessors: int,
        shared_limit: int,
        shared_per_multiprocessor: int,
        capability: int,
    ) -> None: ...
    def refuses(self) -> str: ...
    def workspace(self, tokens: int) -> int: ...
    def forward(self, x: Address, out: Address, tokens: int, stream: int, params: tuple[Address, ...]) -> None: ...
    def backward(
        self,
        x: Address,
        grad: Address,
        grad_x: Address,
        tokens: int,
        workspace: Address,
        stream: int,
        params: tuple[Address, ...],
    ) -> None: ...

class CudaAdapter:
    def __init__(
        self,
        dtype: int,
        activation: int,
        down: Shape,
        up: Shape,
        dtypes: Sequence[int],
        multiprocessors: int,
        shared_limit: int,
        shared_per_multiprocessor: int,
        capability: int,
    ) -> None: ...
    def refuses(self) -> str: ...
    def workspace(self, tokens: int) -> int: ...
    def forward(
        self,
        x: Address,
        residual: Address,
        out: Address,
        add_x: bool,
        tokens: int,
        scale: float,
        stream: int,
        params: tuple[Address, ...],
    ) -> None: ...
    def backward(
        self,
        x: Address,
        grad: Address,
        grad_x: Address,
        add_x: bool,
        tokens: int,
        scale: float,
        workspace: Address,
        stream: int,
        params: tuple[Address, ...],
    ) -> None: ...
