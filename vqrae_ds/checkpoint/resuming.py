"""Go on from a checkpoint, over the same or another number of ranks.

All files are read by this project's own readers, which build nothing but data. Everything is opened
and compared with the engines first, on all ranks together; only then is anything changed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash

from vqrae_ds import manifest
from vqrae_ds.checkpoint.names import TRAINER_STATE, TrainState, random_file
from vqrae_ds.config.files import read_json
from vqrae_ds.conversion.rank_files import DISCRIMINATOR, GENERATOR, entry
from vqrae_ds.conversion.rank_files import load as load_data
from vqrae_ds.ranks import failing_together
from vqrae_ds.sharding import loading
from vqrae_ds.sharding.ema import WeightAverage

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """What a checkpoint brings beside what `resume` has loaded already.

    `extra` is as it was in its `Content`, every float to the last bit. `pretrained` is the record
    of the run's file of frozen pretrained weights, None where the checkpoint refers to none.
    """

    state: TrainState
    extra: dict[str, Any]
    pretrained: manifest.FileRecord | None


def resume(
    folder: Path,
    generator: Any,
    discriminator: Any,
    ema: WeightAverage | None = None,
    *,
    seed: int = 0,
) -> Resumed:
    """Load everything that `save` wrote into engines of the same configuration.

    All ranks call it; there may be more or fewer of them than wrote `folder`. Then the random
    states are drawn anew, from `seed`, the rank and the step. The learning rates are left to the
    caller. Raises `ValueError`, on all ranks together and before anything is changed, where a file
    is missing, damaged or holds anything but data, and where its tensors are not the engines'.
    """
    engines = {GENERATOR: generator, DISCRIMINATOR: discriminator}
    engines = {tag: engine for tag, engine in engines.items() if engine is not None}
    with failing_together():
        saved = read_json(folder / TRAINER_STATE, "run.output_dir")
        state = TrainState(saved["step"], saved["samples"])
        written = manifest.read_manifest(folder)
        ranks_before, random_state = written.world_size, None
        if ranks_before == dist.get_world_size():
            random_state = _read_random_state(random_file(folder))
        stored = {tag: _open(folder, tag, engine) for tag, engine in engines.items()}
        averages = None if ema is None else stored[GENERATOR].weights.averages()
    for tag, engine in engines.items():
        loading.load(engine, stored[tag])
    if averages is not None:
        ema.load(averages)
    if random_state is None:
        # The ranks of a tensor group draw the same.
        data_rank = dist.get_rank(generator.optimizer.dp_process_group)
        label = f"resume {seed} {data_rank} {state.step}"
        torch.manual_seed(xxhash.xxh3_64_intdigest(label.encode()))
    else:
        _set_random_state(random_state)
    logger.info("resumed from %s at step %d: %s", folder, state.step, _describe(ranks_before))
    return Resumed(state, saved.get("extra", {}), written.frozen)


def _open(folder: Path, tag: str, engine: Any) -> loading.Stored:
    if not (folder / tag).is_dir():
        raise ValueError(f"{folder} holds no {tag}: losses.adversarial was off when it was written")
    return loading.open_stored(folder / tag, engine)


def _describe(ranks_before: int) -> str:
    ranks = dist.get_world_size()
    if ranks == ranks_before:
        return f"written by {ranks} ranks, as many as now"
    return (
        f"written by {ranks_before} ranks, now {ranks}: same global batch and data, sums in "
        "another order, random states drawn anew"
    )


def _read_random_state(file: Path) -> dict[str, torch.Tensor]:
    state = load_data(file)
    entry(state, "cpu", torch.Tensor, file)
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
