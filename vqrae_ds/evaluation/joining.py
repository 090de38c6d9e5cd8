"""The ranks of a tool that may also be one plain process: torchrun, the deepspeed launcher, none.

Their group is gloo's, with GPUs too: what they tell one another is small and lies on the CPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from vqrae_ds.data.opening import Reader
from vqrae_ds.worker import this_worker


@contextlib.contextmanager
def joined_ranks() -> Iterator[Reader]:
    """This process among its peers, by the environment that a launcher leaves; alone without one.

    All of them leave together, unless by an exception. Raises `ValueError` for an environment that
    is not whole, and for tasks of srun: it tells them their numbers, but not where they meet.
    """
    if "RANK" in os.environ:
        try:
            dist.init_process_group("gloo", init_method="env://")
        except ValueError as error:
            message = f"RANK is set, but the launcher's other words are not: {error}"
            raise ValueError(message) from error
    elif (tasks := this_worker(os.environ).world_size) > 1:
        raise ValueError(
            f"srun started {tasks} tasks, and each would measure the whole set: have it start "
            "torchrun once a node, srun --ntasks-per-node=1 torchrun --nnodes=NODES "
            "--nproc_per_node=GPUS --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 "
            "tools/evaluate.py ... (for one process alone: env -u SLURM_STEP_NUM_TASKS)"
        )
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Reader(dist.get_rank(), dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()
