"""The native module (csrc/bindings*.cpp). An address is an integer, and 0 for an absent tensor."""

from collections.abc import Sequence
from typing import Any

Shape = tuple[int, int, int, int, int, int, bool, bool]  # terms, n_in, n_out, rank, in, out, has bias, transposed
Choice = tuple[int, int, int, int]  # groups, addresses of route and mix, dtype of mix
Addresses = tuple[int, ...]

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...

class Tensors:
    """Signatures (bytes) and addresses of tensors; None if DLPack does not describe one of them."""

    def __init__(self, kind: type, api: object) -> None: ...
    def signature(self, tensors: tuple[Any, ...]) -> bytes | None: ...
    def addresses(self, tensors: tuple[Any, ...]) -> Addresses | None: ...

class Linear:
    def __init__(self, dtype: int, shape: Shape, dtypes: Sequence[int]) -> None: ...
    def forward(
        self, x: int, base: int, out: int, tokens: int, scale: float, threads: int, params: Addresses
    ) -> None: ...
    def backward(
        self, x: int, grad: int, grad_x: int, tokens: int, scale: float, threads: int, params: Addresses
    ) -> None: ...

class Adapter:
    """norm: the addresses of weight, bias and rows; in backward of weight, rows and grad_rows."""

    def __init__(self, dtype: int, activation: int, down: Shape, up: Shape, dtypes: Sequence[int]) -> None: ...
    def forward(
        self, x: int, residual: int, out: int, add_x: bool, tokens: int, scale: float, threads: int, params: Addresses
    ) -> None: ...
    def backward(
        self, x: int, grad: int, grad_x: int, add_x: bool, tokens: int, scale: float, threads: int, params: Addresses
    ) -> None: ...
    def forward_normed(
        self,
        x: int,
        residual: int,
        out: int,
        add_x: bool,
        tokens: int,
        scale: float,
        norm: Addresses,
        eps: float,
        threads: int,
        params: Addresses,
    ) -> None: ...
    def backward_normed(
        self,
        x: int,
        grad: int,
        grad_x: int,
        add_x: bool,
        tokens: int,
        scale: float,
        norm: Addresses,
        eps: float,
        threads: int,
        params: Addresses,
    ) -> None: ...

class Bank:
    """adapters: their number; the last two: whether the rules of down and up belong to all."""

    def __init__(
        self,
        dtype: int,
        activation: int,
        down: Shape,
        up: Shape,
        dtypes: Sequence[int],
        adapters: int,
        shared_rule_down: bool,
        shared_rule_up: bool,
    ) -> None: ...
    def forward(
        self,
        x: int,
        residual: int,
        out: int,
        add_x: bool,
        tokens: int,
        scale: float,
        choice: Choice,
        threads: int,
        params: Addresses,
    ) -> None: ...
    def backward(
        self,
        x: int,
        grad: int,
        grad_x: int,
        add_x: bool,
        tokens: int,
        scale: float,
        choice: Choice,
        grad_mix: int,
        threads: int,
        params: Addresses,
    ) -> None: ...

def cuda_versions() -> list[int]:
    """The versions of CUDA that the driver serves and that is linked in, 1000 major + 10 minor."""

class CudaLinear:
    """The last four arguments are those of `Device` in csrc/cuda/launch.h.

    forward_workspace, workspace: the floats that forward and backward need for themselves.

    division: the blocks of a backward, the tokens of a tile, and the tiles that a block can hold.
    """

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
    def forward_workspace(self, tokens: int) -> int: ...
    def workspace(self, tokens: int) -> int: ...
    def division(self, tokens: int) -> list[int]: ...
    def forward(
        self, x: int, base: int, out: int, tokens: int, scale: float, workspace: int, stream: int, params: Addresses
    ) -> None: ...
    def backward(
        self,
        x: int,
        grad: int,
        grad_x: int,
        tokens: int,
        scale: float,
        workspace: int,
        stream: int,
        params: Addresses,
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
    def forward_workspace(self, tokens: int) -> int: ...
    def workspace(self, tokens: int) -> int: ...
    def division(self, tokens: int) -> list[int]: ...
    def forward(
        self,
        x: int,
        residual: int,
        out: int,
        add_x: bool,
        tokens: int,
        scale: float,
        workspace: int,
        stream: int,
        params: Addresses,
    ) -> None: ...
    def backward(
        self,
        x: int,
        grad: int,
        grad_x: int,
        add_x: bool,
        tokens: int,
        scale: float,
        workspace: int,
        stream: int,
        params: Addresses,
    ) -> None: ...

class CudaBank:
    def __init__(
        self,
        dtype: int,
        activation: int,
        down: Shape,
        up: Shape,
        dtypes: Sequence[int],
        adapters: int,
        shared_rule_down: bool,
        shared_rule_up: bool,
        multiprocessors: int,
        shared_limit: int,
        shared_per_multiprocessor: int,
        capability: int,
    ) -> None: ...
    def refuses(self, mixed: bool) -> str: ...
    def forward_workspace(self, tokens: int, choice: Choice) -> int: ...
    def workspace(self, tokens: int, choice: Choice, weights: bool, mix: bool) -> int: ...
    def forward(
        self,
        x: int,
        residual: int,
        out: int,
        add_x: bool,
        tokens: int,
        scale: float,
        choice: Choice,
        workspace: int,
        stream: int,
        params: Addresses,
    ) -> None: ...
    def backward(
        self,
        x: int,
        grad: int,
        grad_x: int,
        add_x: bool,
        tokens: int,
        scale: float,
        choice: Choice,
        grad_mix: int,
        workspace: int,
        stream: int,
        params: Addresses,
    ) -> None: ...
