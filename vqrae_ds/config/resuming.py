"""Which keys of a run's configuration may differ when it goes on from its checkpoint: a short list.

Every other difference is refused, and so is that of a key which is new, until it is listed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vqrae_ds.config.checking import check, show
from vqrae_ds.config.reading import Run
from vqrae_ds.config.schema import TrainConfig

# They change where things lie, what is shown, when a run gives up, or what is computed twice and
# sent when; no number beyond rounding, with one exception: what is measured by micro batch (the
# adaptive weight, the moving averages of codes) depends on its size, as on the number of ranks.
MAY_DIFFER = frozenset(
    {
        # Places.
        "run.output_dir",
        "data.train",
        "data.validation",
        "model.encoder_config_path",
        "losses.perceptual.weights",
        "losses.convnext.weights",
        # First weights: a run that goes on has them no more.
        "init.from_run",
        "init.model",
        "init.encoder_weights",
        "init.allow_untrained_encoder",
        # What is kept and shown, and when.
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "checkpoint.keep_every",
        "checkpoint.local_dir",
        "monitor.log_every_steps",
        "monitor.validate_every_steps",
        "monitor.num_images",
        "monitor.usage_window_tokens",
        "monitor.peak_tflops",
        "run.profile_steps",
        # How it is computed.
        "data.num_workers",
        "data.prefetch_batches",
        "run.collective_timeout_minutes",
        "run.deterministic",
        "memory.encoder_checkpointing",
        "memory.decoder_checkpointing",
        "memory.frozen_encoder",
        # When a step is not taken, and when a run ends by itself.
        "guard.spike_factor",
        "guard.max_skipped_steps",
        "guard.no_progress_seconds",
        # Which samples are passed over, and when a run ends for them.
        "data.bad_samples",
        "data.max_bad_share",
        "data.max_image_pixels",
        "data.max_image_bytes",
        # What follows from the number of ranks; train_batch_size may not differ.
        "deepspeed.gradient_accumulation_steps",
        "deepspeed.train_micro_batch_size_per_gpu",
        # How ZeRO communicates. Neither the stage nor sub_group_size, which cuts the partitions.
        "deepspeed.zero_optimization.allgather_bucket_size",
        "deepspeed.zero_optimization.contiguous_gradients",
        "deepspeed.zero_optimization.memory_efficient_linear",
        "deepspeed.zero_optimization.overlap_comm",
        "deepspeed.zero_optimization.reduce_bucket_size",
        "deepspeed.zero_optimization.stage3_max_live_parameters",
        "deepspeed.zero_optimization.stage3_max_reuse_distance",
        "deepspeed.zero_optimization.stage3_param_persistence_threshold",
        "deepspeed.zero_optimization.stage3_prefetch_bucket_size",
        "deepspeed.zero_optimization.zero_hpz_partition_size",
    }
)

_NOT_SET = object()
_ALONE = {"tensor_parallel": {"autotp_size": 1}}  # what a JSON without the section means


def record(run: Run) -> dict[str, Any]:
    """What `check_same_run` compares with, for JSON: both files of the run as resolved."""
    return {"config": run.config.model_dump(mode="json"), "deepspeed": run.deepspeed}


def check_same_run(run: Run, saved: Mapping[str, Any], where: Path) -> None:
    """Raise `ValueError` where `run` is not the one of `saved`, a `record` in the file `where`.

    A key of the YAML that is newer than the record counts as having had its default.
    """
    began = check(TrainConfig, saved["config"], prefix=f"{where}: ")
    ours = {**run.config.model_dump(), "deepspeed": {**_ALONE, **run.deepspeed}}
    theirs = {**began.model_dump(), "deepspeed": {**_ALONE, **saved["deepspeed"]}}
    found = [d for d in _differences(ours, theirs, "") if d.name not in MAY_DIFFER]
    if found:
        name, here, there = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(
            f"{name} = {here} differs from {there} in {where}{more}: a run goes on as it began. "
            "Set it back, or start a new run, with another run.output_dir, from the weights of "
            f"this one: init.from_run={where.parent}"
        )


class _Difference(NamedTuple):
    """The full name of a key, and both values as they are shown."""

    name: str
    ours: str
    theirs: str


def _differences(ours: Any, theirs: Any, name: str) -> Iterator[_Difference]:
    """A section that one side lacks is one difference, at the section itself."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in {**ours, **theirs}:
            values = (side.get(key, _NOT_SET) for side in (ours, theirs))
            yield from _differences(*values, f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield _Difference(name, *("nothing" if v is _NOT_SET else show(v) for v in (ours, theirs)))
