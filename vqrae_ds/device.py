"""The device that a process of a tool works on: a GPU of its own, or the CPU."""

from __future__ import annotations

import os

import torch

from vqrae_ds.worker import this_worker


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`; by default this process's own GPU, or the CPU where there is none.

    Its own GPU has the number that the process has on its machine. It becomes the current one:
    Triton starts its kernels there. Raises `ValueError` for a device that is not there, and where a
    machine has more processes than GPUs: two that share one in silence may run out of its memory.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if name not in ("cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise ValueError(f"--device {name} is neither cpu nor cuda, nor cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device here; use cpu")
    count = torch.cuda.device_count()
    local_rank = int(number) if number else this_worker(os.environ).local_rank
    if number and local_rank >= count:
        raise ValueError(f"--device {name}: torch sees {count} CUDA devices here")
    if local_rank >= count:
        raise ValueError(
            f"rank {local_rank} of this machine finds no GPU of its number, torch sees {count} of "
            "them, counted from 0: start one rank a GPU, or give --device cuda:0 where each rank "
            "sees only its own"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
