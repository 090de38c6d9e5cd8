"""The ranks of a tool that may also be one plain process: torchrun, the deepspeed launcher, none.

Their group is gloo's, with GPUs too: what they tell one another is small and lies on the CPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from vqrae_ds.data.opening import Reader


@contextlib.contextmanager
def joined_ranks() -> Iterator[Reader]:
    """This process among its peers, by the environment that a launcher leaves; alone without one.

    All of them leave together, unless by an exception. Raises `ValueError` for an environment that
    is not whole.
    """
    if "RANK" in os.environ:
        try:
            dist.init_process_group("gloo", init_method="env://")
        except ValueError as error:
            message = f"RANK is set, but the launcher's other words are not: {error}"
            raise ValueError(message) from error
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Reader(dist.get_rank(), dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; by default this rank's own GPU, or the CPU where there is none.

    Raises `ValueError` for a device that is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name is None:
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"--device {name} is neither cpu nor cuda, nor cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device here; use cpu")
    if kind == "cuda" and not number:
        number = str(local_rank)
    if number and int(number) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device {kind}:{number}: torch sees {count} CUDA devices here")
    return torch.device(f"{kind}:{number}" if kind == "cuda" else kind)
