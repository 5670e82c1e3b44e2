"""The native module (csrc/bindings*.cpp). An address is an integer, and 0 for an absent tensor."""

from collections.abc import Sequence
from typing import Any

Shape = tuple[int, int, int, int, bool]  # n, rank, in, out, has bias
Address = int

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...

class Tensors:
    """Signatures (bytes) and addresses of tensors; None if DLPack does not describe one of them."""

    def __init__(self, kind: type, api: object) -> None: ...
    def signature(self, tensors: tuple[Any, ...]) -> bytes | None: ...
    def places(self, tensors: tuple[Any, ...]) -> tuple[Address, ...] | None: ...

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
    """The last four arguments are those of `Device` in csrc/cuda/launch.h."""

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
