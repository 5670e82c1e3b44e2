"""Two processes of one run on this machine.

They are forks of a server that has imported the libraries already, which takes each of them seconds
otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes

IMPORTED = [
    *("torch.distributed.fsdp", "datasets", "compacter_kernels.cli", "transformers.trainer"),
    *("transformers.models.bert.modeling_bert", "transformers.models.t5.modeling_t5"),
]


def run_two(function: Callable[..., Any], *arguments: Any) -> None:
    """Run function(rank, *arguments) in two processes. An exception of one is raised here.

    A DistributedDataParallel of function must be gone before the process group is destroyed. As the
    last owner of the group it would free it with Python's lock held, and might wait forever for a
    thread of gloo that waits for this lock.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    start_processes(function, arguments, nprocs=2, start_method="forkserver")


def free_port() -> int:
    """A port that no process uses at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def as_torchrun(rank: int, port: int) -> None:
    """Set the environment of this process, one of two, as torchrun does."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")


def _run_command(rank: int, command: list[str], port: int, output: Path) -> None:
    as_torchrun(rank, port)
    from compacter_kernels.cli import main

    with (output / str(rank)).open("w", encoding="utf-8") as sys.stdout:
        code = main(command)
    if code:
        raise SystemExit(code)


def run_command(command: list[str], output: Path) -> str:
    """Run a command of the package in two processes, as torchrun does. Returns what they print."""
    output.mkdir()
    run_two(_run_command, command, free_port(), output)
    return "".join((output / str(rank)).read_text(encoding="utf-8") for rank in range(2))
