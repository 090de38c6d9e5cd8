"""What share of its peak one GPU reaches in training, and whether the planned memory is right.

The trainer's own loop and engines, one rank, in a process of its own. A step is timed from when the
loop asks for its first batch until it asks for the one after its last, the device waited for at
both ends: the loader, all losses, both optimizers are in it. FLOPs are those of the console line
(`monitoring/flops.py`): of the model, without what checkpointing computes twice, LPIPS and the
discriminator. Nothing is logged, validated or saved: the loop is left when the last step has been
timed, for a checkpoint would be as large as the GPU.

The peak of the memory is that of the timed steps on a GPU. On a CPU it is what the console line
shows, of the whole process with all libraries, and no goal applies to it.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vqrae_ds.attention import choose_attention
from vqrae_ds.benchmarks.launch import Machine, choose_machine, run_ranks
from vqrae_ds.benchmarks.mfu_runs import Depth, Recipe, choose_depth, read_recipe, write_run
from vqrae_ds.benchmarks.step import Trainer
from vqrae_ds.benchmarks.table import Goal, Report, Row, describe_machine, judge
from vqrae_ds.monitoring.flops import flops_per_image
from vqrae_ds.monitoring.throughput import peak_memory_gb, peak_tflops
from vqrae_ds.planning import GB, peak_bytes, plan

if TYPE_CHECKING:
    from vqrae_ds.config import Run
    from vqrae_ds.data.loader import Batch

GOAL, MEMORY_TOLERANCE = 0.55, 0.07
WARM_UP_STEPS = 2


class Options(NamedTuple):
    """What is measured: `steps` timed steps, 2 or more, of `accumulation` micro batches each.

    Without `peak_tflops` the peak is looked up as the trainer does. Files go to `folder`, a
    temporary one by default.
    """

    depth: Depth
    accumulation: int
    steps: int
    peak_tflops: float | None
    photos: Path
    folder: Path | None


class Found(NamedTuple):
    """Of each timed step: seconds, and how many of them the loop waited for batches."""

    step_seconds: list[float]
    data_seconds: list[float]
    peak_memory_gb: float


class _Measured(Exception):  # noqa: N818 - no error: the end of a loop that would go on
    """All has been timed."""


def measure_mfu(trainer: Trainer, recipes: Sequence[Recipe], options: Options) -> Report:
    """A run of each recipe, one at most of a stage, in a process of its own.

    Raises `ValueError` where a recipe does not hold together or does not fit, and where the peak
    of the machine is not known, and `torch.multiprocessing.ProcessRaisedException` where the
    training fails.
    """
    device_type = choose_machine().device_type
    rows: list[Row] = []
    details: dict[str, Any] = {"goals": {}}
    for recipe in recipes:
        depth = choose_depth(recipe, options.depth, _memory_gb(device_type))
        peak = options.peak_tflops or peak_tflops(read_recipe(recipe, depth))
        if peak is None:
            name = "a CPU" if device_type == "cpu" else torch.cuda.get_device_name()
            raise ValueError(
                f"the peak of {name} at the precision of {recipe.deepspeed_config} is not known: "
                "--peak-tflops gives it"
            )
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder, steps = Path(temporary), WARM_UP_STEPS + options.steps + 1
            run = write_run(folder, recipe, depth, options.accumulation, steps, options.photos)
            file = folder / "found.json"
            machine = Machine(1, device_type)
            run_ranks(machine, _measure_rank, trainer, run, options.steps, file)
            found = Found(**json.loads(file.read_text()))
        name = f"stage{run.config.stage}"
        new = _rows(name, run, found, peak)
        goals = {f"mfu_{name}": Goal(1, None)}
        if device_type == "cuda":
            goals[f"peak_memory_{name}"] = Goal(1 - MEMORY_TOLERANCE, 1 + MEMORY_TOLERANCE)
        details["goals"] |= judge(new, goals)
        details[name] = _details(run, found, peak, device_type)
        rows += new
    return Report("mfu", f"1 rank on {describe_machine(device_type)}", rows, details)


def _memory_gb(device_type: str) -> float:
    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / GB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB


def _measure_rank(rank: int, trainer: Trainer, run: Run, steps: int, file: Path) -> None:
    setup = trainer.prepare(run)
    found: list[Found] = []
    accumulation = run.schedule.batch.accumulation
    batches = timed_steps(setup.batches, accumulation, steps, setup.ranks.device, found)
    try:
        trainer.train(run, setup._replace(batches=batches))
    except _Measured:
        # Of a step that was skipped the optimizer did nothing.
        assert setup.generator.skipped_steps == 0, f"{setup.generator.skipped_steps} steps skipped"
    file.write_text(json.dumps(found[0]._asdict()))


def timed_steps(
    batches: Iterator[Batch],
    accumulation: int,
    steps: int,
    device: torch.device,
    found: list[Found],
) -> Iterator[Batch]:
    """The batches of the trainer's loop; after `steps` timed steps it ends the loop by `_Measured`.

    What was measured is appended to `found` before.
    """
    yield from islice(batches, WARM_UP_STEPS * accumulation)
    start = _now(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_seconds, data_seconds = [], []
    for _ in range(steps):
        waited = 0.0
        for _ in range(accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            yield batch
        end = _now(device)
        step_seconds.append(end - start)
        data_seconds.append(waited)
        start = end
    found.append(Found(step_seconds, data_seconds, peak_memory_gb(device)))
    raise _Measured


def _now(device: torch.device) -> float:
    """Seconds of a clock when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rows(name: str, run: Run, found: Found, peak: float) -> list[Row]:
    """Median step, TFLOP/s and MFU beside what they are at the goal; memory beside the plan."""
    tflop = flops_per_image(run) * run.schedule.batch.global_batch / 1e12
    seconds = statistics.median(found.step_seconds)
    at_goal = f"at an MFU of {GOAL}"
    planned = peak_bytes(plan(run), 1).total / GB
    return [
        Row(f"step_seconds_{name}", seconds, tflop / (GOAL * peak), at_goal, "s"),
        Row(f"model_tflops_{name}", tflop / seconds, GOAL * peak, at_goal, "TFLOP/s"),
        Row(f"mfu_{name}", tflop / seconds / peak, GOAL, "goal", "of the peak"),
        Row(f"peak_memory_{name}", found.peak_memory_gb, planned, "plan", "GB"),
    ]


def _details(run: Run, found: Found, peak: float, device_type: str) -> dict[str, Any]:
    batch = run.schedule.batch
    return {
        "encoder_blocks": run.config.model.feature_layer,
        "decoder_blocks": run.config.model.decoder.num_layers,
        "micro_batch": batch.micro_batch,
        "accumulation": batch.accumulation,
        "attention_of_the_encoder": choose_attention(on_gpu=device_type == "cuda", bf16=run.bf16),
        "peak_tflops": peak,
        "tflop_an_image": flops_per_image(run) / 1e12,
        "step_seconds": [round(seconds, 4) for seconds in found.step_seconds],
        "data_seconds_a_step": [round(seconds, 4) for seconds in found.data_seconds],
    }
