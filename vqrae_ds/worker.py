"""Who this process is among those of a tool, by the environment that its launcher leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

_VARIABLES = (  # of DeepSpeed's launcher and torchrun; of srun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class Worker(NamedTuple):
    """One of `world_size` processes; `local_rank` is its number on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def this_worker(environment: Mapping[str, str]) -> Worker:
    """As the launcher says it; without one, the only one. Raises `ValueError` for no numbers."""
    for names in _VARIABLES:
        found = [environment.get(name) for name in names]
        if found[0] is None or found[1] is None:
            continue
        texts = [found[0], found[1], found[2] or "0"]
        said = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
        if not all(text.isdecimal() for text in texts):
            raise ValueError(f"{said} in the environment are no numbers of a rank")
        worker = Worker(*map(int, texts))
        if worker.rank >= worker.world_size:
            raise ValueError(f"{said} in the environment: a rank is below the number of ranks")
        return worker
    return Worker()
