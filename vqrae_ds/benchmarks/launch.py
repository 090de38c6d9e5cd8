"""Starts the ranks of a benchmark: spawned processes on this machine, without a launcher."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Machine(NamedTuple):
    """How many ranks, and whether on `cpu` or on `cuda`."""

    num_ranks: int
    device_type: str


def choose_machine() -> Machine:
    """Two ranks: on two GPUs, or without any on the CPU; one where there is but one GPU.

    `DS_ACCELERATOR=cpu` keeps a GPU machine on its CPU, as it does the trainer.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return Machine(min(2, torch.cuda.device_count()), "cuda")
    return Machine(2, "cpu")


def require_gpu(what: str, way_out: str = "") -> None:
    """Raise `ValueError` where `choose_machine` finds no GPU for `what`."""
    if choose_machine().device_type == "cuda":
        return
    why = "PyTorch finds none here"
    if torch.cuda.is_available():
        why = "DS_ACCELERATOR=cpu forbids it"
    raise ValueError(f"{what} needs a GPU: {why}{way_out and f'; {way_out}'}")


def run_ranks(machine: Machine, function: Callable[..., None], *args: Any) -> None:
    """Call `function(rank, *args)` in each process, which has yet to join the process group.

    The environment is that of a launcher. `function` and `args` are pickled. The first process
    that fails ends the others, and its traceback is raised here as
    `torch.multiprocessing.ProcessRaisedException`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(
        _run_rank, (machine, port, function, args), nprocs=machine.num_ranks, join=False
    )
    try:
        while not context.join():
            pass
    finally:  # an interrupted benchmark leaves no process behind
        for process in context.processes:
            process.kill()
            process.join()


def _run_rank(
    rank: int, machine: Machine, port: int, function: Callable[..., None], args: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(machine.num_ranks),
        LOCAL_WORLD_SIZE=str(machine.num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR=machine.device_type,
    )
    if machine.device_type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // machine.num_ranks))
    try:
        function(rank, *args)
    finally:
        if dist.is_initialized():  # the trainer leaves the group at its end
            dist.destroy_process_group()
