"""What a training step costs over a bare DeepSpeed loop: time, collectives, waits for the device.

Both loops train the SAME engines on the SAME stream of batches in the same processes. So nothing
differs but the loop: no second model at another place in memory, no second loader, no other minute.
The trainer's loop runs as it is; the bare one has its turns inside the iterator that gives the
batches, between two of the trainer's steps. No step that is compared is logged, validated or saved.
What is done to the engines before the loop begins is charged to both.

First come some steps of both, then some in which calls are counted, then blocks of steps in turns:

    bare  ours  bare  ours  ...  bare

`overhead` compares the medians of all blocks, `overhead_paired` is the median of ratios: each block
of ours over the mean of the two beside it, which takes out a drift. On a machine that does other
things too, the latter is the one to read, beside the ratios of processor time in the details.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from vqrae_ds.benchmarks import bare_loop
from vqrae_ds.benchmarks.counting import Counts, counted, extra
from vqrae_ds.benchmarks.launch import Machine, choose_machine, run_ranks
from vqrae_ds.benchmarks.step_runs import LOSSES, SIZES, Case, Size, write_run
from vqrae_ds.benchmarks.table import Report, Row, describe_machine

if TYPE_CHECKING:
    from vqrae_ds.config import Run
    from vqrae_ds.data.loader import Batch

CASES: tuple[Case, ...] = tuple(LOSSES)
WARM_UP_STEPS, COUNTED_STEPS = 4, 4  # of each loop
BLOCK_STEPS = 2
ALLOWED_COLLECTIVES, ALLOWED_WAITS = 1, 0  # a step
BARE = "bare DeepSpeed loop"


class Trainer(NamedTuple):
    """The two functions of the entry point, which no module of the package imports.

    What `prepare` makes is a `vqrae_ds.preparation.Setup`, and `train` takes it.
    """

    prepare: Callable[[Run], Any]
    train: Callable[[Run, Any], None]


class Seconds(NamedTuple):
    """Of a block: by the clock, and of the processor in this process, which others disturb less."""

    wall: float
    cpu: float


class Found(NamedTuple):
    """What one rank measured: the calls of `COUNTED_STEPS` steps, and each timed block."""

    ours: Counts
    bare: Counts
    ours_blocks: list[Seconds]
    bare_blocks: list[Seconds]  # one more: a block of ours lies between two of these


def measure_step(
    trainer: Trainer,
    cases: Sequence[Case] = CASES,
    pairs: int = 100,
    micro_batch: int | None = None,
) -> Report:
    """Run each case in ranks of its own; `pairs` is the number of timed blocks of ours, 2 or more.

    Without `micro_batch`, images a rank and step, it is that of `step_runs.SIZES`.
    Raises `torch.multiprocessing.ProcessRaisedException` where a rank fails.
    """
    machine = choose_machine()
    size = SIZES[machine.device_type]
    size = size._replace(micro_batch=micro_batch or size.micro_batch)
    rows: list[Row] = []
    details = {}
    for case in cases:
        every_rank = _measure_case(trainer, case, machine, size, pairs)
        rows += _rows(case, every_rank)
        details[case] = _details(every_rank[0])
    described = f"{machine.num_ranks} ranks on {describe_machine(machine.device_type)}"
    return Report("step", described, rows, details)


def _measure_case(
    trainer: Trainer, case: Case, machine: Machine, size: Size, pairs: int
) -> list[Found]:
    total_steps = WARM_UP_STEPS + COUNTED_STEPS + pairs * BLOCK_STEPS + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = write_run(folder, case, machine, total_steps, size)
        run_ranks(machine, _measure_rank, trainer, run, case, pairs, folder)
        files = [folder / f"found{rank}.pickle" for rank in range(machine.num_ranks)]
        return [pickle.loads(file.read_bytes()) for file in files]


def _measure_rank(
    rank: int, trainer: Trainer, run: Run, case: Case, pairs: int, folder: Path
) -> None:
    setup = trainer.prepare(run)
    if case == "stage1_gan":
        bare_step = partial(bare_loop.gan_step, setup.generator, setup.discriminator)
    else:
        bare_step = partial(bare_loop.distillation_step, setup.generator)
    device = setup.ranks.device

    def bare_steps(number: int) -> None:
        for batch in islice(setup.batches, number):
            bare_step(batch.images_B3HW.to(device, non_blocking=True))

    found: list[Found] = []
    batches = take_turns(setup.batches, bare_steps, pairs, device, found)
    trainer.train(run, setup._replace(batches=batches))
    # A step that was skipped would have been compared with one that was not.
    assert setup.generator.skipped_steps == 0, f"{setup.generator.skipped_steps} steps skipped"
    (folder / f"found{rank}.pickle").write_bytes(pickle.dumps(found[0]))


def take_turns(
    batches: Iterator[Batch],
    bare_steps: Callable[[int], None],
    pairs: int,
    device: torch.device,
    found: list[Found],
) -> Iterator[Batch]:
    """The batches of the trainer's loop, which asks for one a step, when the step before is over.

    `bare_steps` takes a number of steps of the bare loop. What was measured is appended to `found`
    before the last batch, whose step is logged and saved. Every rank calls it.
    """
    for _ in range(WARM_UP_STEPS):
        yield next(batches)
        bare_steps(1)
    with counted(device.type) as bare:
        bare_steps(COUNTED_STEPS)
    with counted(device.type) as ours:
        yield from islice(batches, COUNTED_STEPS)

    ours_blocks, bare_blocks = [], []
    for _ in range(pairs):
        bare_blocks.append(_timed(device, bare_steps))
        start = _now(device)
        yield from islice(batches, BLOCK_STEPS)
        ours_blocks.append(_since(start, device))
    bare_blocks.append(_timed(device, bare_steps))
    found.append(Found(ours, bare, ours_blocks, bare_blocks))
    yield next(batches)


def _timed(device: torch.device, steps: Callable[[int], None]) -> Seconds:
    start = _now(device)
    steps(BLOCK_STEPS)
    return _since(start, device)


def _now(device: torch.device) -> Seconds:
    """The time when all ranks have come here and their devices are done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return Seconds(time.perf_counter(), time.process_time())


def _since(start: Seconds, device: torch.device) -> Seconds:
    now = _now(device)
    return Seconds(now.wall - start.wall, now.cpu - start.cpu)


def _rows(case: Case, every_rank: list[Found]) -> list[Row]:
    """Times are those of rank 0, which waits for the others; of the counts the worst rank's."""
    paired = statistics.median(_wall_ratios(every_rank[0]))
    ours_ms, bare_ms = (
        1e3 * statistics.median(block.wall for block in blocks) / BLOCK_STEPS
        for blocks in (every_rank[0].ours_blocks, every_rank[0].bare_blocks)
    )
    collectives = max(extra(found.ours.collectives, found.bare.collectives) for found in every_rank)
    waits = max(extra(found.ours.waits, found.bare.waits) for found in every_rank)
    counts = (("collectives", collectives, ALLOWED_COLLECTIVES), ("syncs", waits, ALLOWED_WAITS))
    return [
        Row(f"overhead_{case}", ours_ms, bare_ms, BARE, "ms a step"),
        Row(f"overhead_paired_{case}", paired, 1, BARE, "of neighbouring blocks"),
        *(
            Row(f"extra_{what}_{case}", number / COUNTED_STEPS, allowed, "allowed", "a step")
            for what, number, allowed in counts
        ),
    ]


def _details(found: Found) -> dict[str, Any]:
    """Of one rank: the spread of the paired ratios, and which calls ours makes more often."""
    ours, bare, wall = found.ours_blocks, found.bare_blocks, _wall_ratios(found)
    cpu = paired_ratios([block.cpu for block in ours], [block.cpu for block in bare])
    more = found.ours.collectives - found.bare.collectives + (found.ours.waits - found.bare.waits)
    return {
        "pairs": len(wall),
        "steps_a_block": BLOCK_STEPS,
        "quartiles_of_paired_ratios": _quartiles(wall),
        "quartiles_of_paired_ratios_of_cpu_seconds": _quartiles(cpu),
        "collectives_a_step": {
            "ours": found.ours.collectives.total() / COUNTED_STEPS,
            "bare": found.bare.collectives.total() / COUNTED_STEPS,
        },
        "more_in_ours_a_step": {
            f"{call.operator} at {call.place}": number / COUNTED_STEPS
            for call, number in more.items()
        },
    }


def _wall_ratios(found: Found) -> list[float]:
    ours, bare = found.ours_blocks, found.bare_blocks
    return paired_ratios([block.wall for block in ours], [block.wall for block in bare])


def paired_ratios(ours: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Each of ours over the mean of the two of `bare` that it lies between."""
    beside = [(before + after) / 2 for before, after in pairwise(bare)]
    return [mine / peer for mine, peer in zip(ours, beside, strict=True)]


def _quartiles(ratios: Sequence[float]) -> list[float]:
    """The first, the median and the third."""
    return [round(q, 4) for q in statistics.quantiles(ratios, n=4, method="inclusive")]
