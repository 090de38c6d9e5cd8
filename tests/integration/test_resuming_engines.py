"""What a resume restores beside tensors, what it refuses on all ranks, and that it runs no code."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.test_zero_shards import Payload
from tests.tiny import GAN, make_rank_folders, make_run, make_setup
from tests.zero_files import seal
from vqrae_ds import checkpoint
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run

pytestmark = pytest.mark.slow

RANKS, STEP = 2, 3
LOSSES = {"perceptual": None, "adversarial": {"weight": 0.1, **GAN}}
EXTRA = {"guard": {"a": 0.1 + 0.2, "b": 1 / 3, "c": 5e-324, "d": math.inf}, "skipped": 3}
READ = [  # a file of each kind that a resume reads, of the rank that does not lead
    "generator/zero_pp_rank_1_mp_rank_00_model_states.pt",
    "generator/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "discriminator/mp_rank_00_model_states.pt",
    "discriminator/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "ema_rank_00001.pt",
    "rng_rank_00001.pt",
]


def make(rank: int, folder: Path, stage: int = 1, **sections: Any) -> Run:
    output = {"output_dir": str(folder / f"run{stage}")}
    sections = {"run": output, "ema": {"decay": 0.9}, "losses": LOSSES, **sections}
    return make_run(folder / f"rank{rank}", stage, **sections)


def check_random_states(rank: int, folder: Path) -> None:
    run = make(rank, folder)
    setup = make_setup(run)
    torch.manual_seed(100 + rank)
    options = {"ema": setup.ema, "extra": EXTRA}
    reached = TrainState(STEP, 12)
    saved = checkpoint.save(
        run, checkpoint.Content(setup.generator, setup.discriminator, reached, **options)
    )
    expected = torch.rand(3)
    again = fresh(run)
    found = checkpoint.resume(saved, *again)
    assert (found.state, found.extra) == (TrainState(STEP, 12), EXTRA)
    assert torch.equal(torch.rand(3), expected)

    found = [torch.get_rng_state() for _ in range(3)]
    if rank == 0:
        seal(saved, step=STEP, world_size=3)  # as if a third rank had been there
    dist.barrier()
    for i, seed in enumerate((7, 7, 8)):
        checkpoint.resume(saved, *again, seed=seed)
        found[i] = torch.get_rng_state()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    ranks = [torch.empty_like(found[0]) for _ in range(RANKS)]
    dist.all_gather(ranks, found[0])
    assert not torch.equal(*ranks), "each rank has random numbers of its own"
    if rank == 0:
        seal(saved, step=STEP, world_size=RANKS)
    dist.barrier()


def fresh(run: Run) -> tuple[Any, Any, Any]:
    from vqrae_ds import engines
    from vqrae_ds.sharding.ema import WeightAverage

    generator = engines.build_generator(run, fill=False)
    return generator, engines.build_discriminator(run), WeightAverage(generator, 0.9)


@contextlib.contextmanager
def changed_by(rank: int, saved: Path, name: str, change: Callable[[Path], None]) -> Iterator[None]:
    """Rank 0 changes a file for the while, and lets the manifest vouch for it as it is then."""
    path, whole = saved / name, (saved / name).read_bytes()
    dist.barrier()
    if rank == 0:
        change(path)
        seal(saved, step=STEP, world_size=RANKS)
    dist.barrier()
    yield
    dist.barrier()
    if rank == 0:
        path.write_bytes(whole)
        seal(saved, step=STEP, world_size=RANKS)
    dist.barrier()


def check_hostile_files(rank: int, folder: Path) -> None:
    run = make(rank, folder)
    saved, trap = checkpoint.find(run), folder / "trap"
    engines = fresh(run)
    before = [weights_of(engine) for engine in engines[:2]]

    def arm(path: Path) -> None:
        hidden = {"extra": Payload(os.system, f"touch {trap}")}
        torch.save(torch.load(path, weights_only=False) | hidden, path)

    for name in READ:
        with changed_by(rank, saved, name, arm):
            assert checkpoint.find(run) == saved, "the manifest vouches for it"
            with pytest.raises(ValueError, match=rf"{name} wants to load \w+.system.*: refused"):
                checkpoint.resume(saved, *engines)
            assert not trap.exists()
            dist.barrier()
            if rank == 0:
                torch.load(saved / name, weights_only=False)
                assert trap.exists(), "the trap must be armed for this to say anything"
                trap.unlink()
    for name in ("generator/zero_pp_rank_1_mp_rank_00_optim_states.pt", "rng_rank_00001.pt"):
        with changed_by(rank, saved, name, Path.unlink), pytest.raises(ValueError, match=name):
            checkpoint.resume(saved, *engines)
    for engine, weights in zip(engines, before, strict=False):
        for mine, other in zip(weights_of(engine), weights, strict=True):
            assert torch.equal(mine.nan_to_num(9), other.nan_to_num(9)), "nothing was changed"
    checkpoint.resume(saved, *engines)


def weights_of(engine: Any) -> list[torch.Tensor]:
    from vqrae_ds.sharding.partitions import masters

    return [master.clone() for master in masters(engine)]


def check_misfits(rank: int, folder: Path) -> None:
    """Other tensors than the engine's, on the word of no configuration."""
    run = make(rank, folder)
    saved = checkpoint.find(run)
    head = r"vqrae\.decoder\.head\.weight is \(192, \d+\) and not \(768, \d+\)"
    misfits = [
        (make(rank, folder, model={"output_patch_size": 16}), head),
        (make(rank, folder, 2), r"teacher\.\S+ is missing"),
    ]
    for other, message in misfits:
        generator, discriminator, _ = fresh(other)
        with pytest.raises(ValueError, match=f"generator does not fit this run: .*{message}"):
            checkpoint.resume(saved, generator, discriminator)
    without_teacher = make(rank, folder, 2, losses=LOSSES | {"distillation": None})
    generator, discriminator, _ = fresh(without_teacher)
    with pytest.raises(ValueError, match=r"vqrae\.encoder\.\S+ is not trained, .* more: go on"):
        checkpoint.resume(saved, generator, discriminator)

    run = make(rank, folder, run={"output_dir": str(folder / "bare")})
    setup = make_setup(run)
    bare = checkpoint.save(run, checkpoint.Content(setup.generator, None, TrainState(1, 4)))
    with pytest.raises(ValueError, match="holds no discriminator: losses.adversarial was off"):
        checkpoint.resume(bare, setup.generator, setup.discriminator)
    with pytest.raises(ValueError, match="holds no moving average .* for ema was off"):
        checkpoint.resume(bare, setup.generator, None, setup.ema)
    assert checkpoint.resume(bare, setup.generator, None).extra == {}


def check_all(rank: int, folder: Path) -> None:
    check_random_states(rank, folder)
    check_hostile_files(rank, folder)
    check_misfits(rank, folder)


def test_what_is_restored_and_what_is_refused(tmp_path: Path) -> None:
    make_rank_folders(tmp_path, RANKS)
    run_ranks(RANKS, check_all, tmp_path)
