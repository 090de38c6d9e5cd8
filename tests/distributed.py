"""Run a test function on several real ranks: own processes, gloo, no launcher and no ports.

The ranks are forked from a server that has imported DeepSpeed and done nothing else, for the
import costs each of them more than most tests do.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

FORK_SERVER = "forkserver"
IMPORTED_ONCE = [
    "vqrae_ds.engines",
    "vqrae_ds.preparation",
    "vqrae_ds.train",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by every engine, and PyTorch's compiler with it
]

# The default of 30 minutes would let one failed rank block its peers for that long.
PROCESS_GROUP_TIMEOUT = timedelta(seconds=60)


def run_ranks(
    world_size: int, function: Callable[..., None], *args: Any, timeout_seconds: float = 240.0
) -> None:
    """Call `function(rank, *args)` in `world_size` processes that share DeepSpeed's gloo group.

    `function` and `args` are pickled: a function of a module, not a closure. The first rank that
    fails ends the others, and its traceback is raised here as `mp.ProcessRaisedException`.
    Raises `TimeoutError`, and kills the ranks, when they take longer than `timeout_seconds`.
    """
    mp.set_forkserver_preload(IMPORTED_ONCE)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        # The server has the environment of its start, the ranks that of this call.
        rank_args = (world_size, rendezvous, dict(os.environ), function, args)
        context = mp.start_processes(
            _run_rank, rank_args, nprocs=world_size, join=False, start_method=FORK_SERVER
        )
        deadline = time.monotonic() + timeout_seconds
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    seconds = f"{timeout_seconds:.0f} s"
                    raise TimeoutError(f"{function.__name__} ran longer than {seconds}")
        finally:  # no rank outlives its test, whatever ends it
            for process in context.processes:
                process.kill()
                process.join()


def _run_rank(
    rank: int,
    world_size: int,
    rendezvous: str,
    environment: dict[str, str],
    function: Callable[..., None],
    args: tuple,
) -> None:
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # read by DeepSpeed, unused: the rendezvous is a file
        DS_ACCELERATOR="cpu",
        DS_LOG_LEVEL="error",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage at every turn: what was imported is none
    import deepspeed

    # Its just-in-time build takes minutes, and hangs on the lock file of a killed build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=PROCESS_GROUP_TIMEOUT,
        verbose=False,
    )
    try:
        function(rank, *args)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    # All is done by now. What would follow is the interpreter's teardown among threads of gloo,
    # which once ended a finished rank by std::terminate.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The whole weights of a partitioned module on every rank, to read."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield
