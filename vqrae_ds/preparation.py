"""From a checked run to everything that the training loop works with.

Torch and what needs it are imported in the functions, so that a mistake in the configuration does
not wait for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from vqrae_ds import run_folder, watchdog
from vqrae_ds.config import DataConfig, LossConfig, Run
from vqrae_ds.stopping import StopRequest

if TYPE_CHECKING:
    from vqrae_ds.checkpoint import TrainState
    from vqrae_ds.data.bad_data import BadData
    from vqrae_ds.data.index import ShardIndex
    from vqrae_ds.data.loader import Batch
    from vqrae_ds.data.opening import Reader
    from vqrae_ds.data.twins import Twins
    from vqrae_ds.engines import DeepSpeedEngine, Ranks
    from vqrae_ds.guard import Guard
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.losses.perceptual import PerceptualLoss
    from vqrae_ds.manifest import FileRecord
    from vqrae_ds.sharding.ema import WeightAverage
    from vqrae_ds.stopping import StopVote

logger = logging.getLogger(__name__)


class Setup(NamedTuple):
    """Everything that the loop works with."""

    ranks: Ranks
    generator: DeepSpeedEngine
    discriminator: DeepSpeedEngine | None
    objective: Objective
    perceptual: PerceptualLoss | None
    guard: Guard
    bad_data: BadData
    stop: StopVote
    ema: WeightAverage | None
    batches: Iterator[Batch]
    num_samples: int  # of the training data
    validation_index: ShardIndex | None
    state: TrainState
    pretrained: FileRecord | None = None  # the run's file of frozen pretrained weights
    data_digest: str = ""  # of the shards of the training data; empty where they are streamed
    twins: Twins | None = None  # None where no other rank sees the same images
    lock: IO[str] | None = None  # keeps other starts out of the run's folder as long as it lives

    def must_stop(self) -> bool:
        """Whether too many steps were skipped in a row, or too many samples; on all ranks alike."""
        return self.guard.must_stop() or self.bad_data.must_stop()

    def equalize(self) -> float:
        """See `replicas.equalize`. Raises `DataFailed` where the group has seen other images."""
        from vqrae_ds.sharding import replicas

        if self.twins is not None:
            self.twins.check()
        return replicas.equalize(self.generator)

    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the engines, for `prepare`; all ranks call it.

        Raises `DataFailed` where there must be no checkpoint, as `equalize` does.
        """
        if self.twins is not None:
            self.twins.check()
        return {
            "guard": self.guard.state(),
            "bad_data": self.bad_data.agree(),
            "num_samples": self.num_samples,
            "data_digest": self.data_digest,
        }


def prepare(run: Run, stop_request: StopRequest | None = None) -> Setup:
    """Read the data's index, build the engines, and load what there is to go on from.

    `stop_request` is obeyed by the loop; without it only the file of the run's folder is.
    Raises `ValueError` where something that the run needs is missing or does not fit, and `OSError`
    where the run's folder takes no more.
    """
    # Imported here, so that a mistake in the configuration does not wait for torch.
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.data.bad_data import BadData
    from vqrae_ds.data.twins import Twins
    from vqrae_ds.guard import Guard
    from vqrae_ds.ranks import failing_together
    from vqrae_ds.sharding.ema import WeightAverage
    from vqrae_ds.stopping import StopVote

    config = run.config
    timeout = timedelta(minutes=config.run.collective_timeout_minutes)
    tensor_size = run.schedule.batch.tensor_size
    ranks = engines.start(timeout, config.run.deterministic, tensor_size)
    with failing_together():
        lock = run_folder.enter(Path(config.run.output_dir), ranks.rank)
    index, validation_index = _open_indices(config.data, ranks)

    checkpoint.prepare_local_dir(run)
    watchdog.begin("the search for a checkpoint")
    folder = checkpoint.find(run)  # the first of the starting points of config.InitConfig
    if folder is None:
        run = checkpoint.resolve_start(run)
    watchdog.begin("the building of the engines")
    generator = engines.build_generator(run, fill=folder is None)
    discriminator = engines.build_discriminator(run, fill=folder is None)
    ema = None if config.ema is None else WeightAverage(generator, config.ema.decay)
    if folder is not None:
        start = _resume(run, folder, index, generator, discriminator, ema)
    else:
        start = _begin(run, ranks, index, generator)
    checkpoint.warn_of_shortage(run, generator, discriminator, ema)
    stop = StopVote(stop_request or stop_request_of(run), ranks.rank, ranks.device)
    objective, perceptual = _objective(run, ranks, discriminator, stop)
    sees_its_own = ranks.rank % tensor_size == 0
    twins = None
    if generator.mpu is not None:
        twins = Twins(generator.mpu.get_model_parallel_group(), ranks.device)
    batches = _training_batches(run, ranks, index, start=start.state.samples)
    return Setup(
        ranks,
        generator,
        discriminator,
        objective,
        perceptual,
        Guard(config.guard, start.extra.get("guard"), tensor_size),
        BadData(config.data.max_bad_share, start.extra.get("bad_data"), sees_its_own=sees_its_own),
        stop,
        ema,
        batches if twins is None else twins.noting(batches),
        0 if index is None else index.num_samples,  # nobody knows it of shards that are streamed
        validation_index,
        start.state,
        start.pretrained,
        "" if index is None else index.digest(),
        twins,
        lock,
    )


def watchdog_of(run: Run, rank: int) -> watchdog.Watchdog:
    """The watchdog of a rank; it watches as a context."""
    folder = Path(run.config.run.output_dir) / "stacks"
    return watchdog.Watchdog(run.config.guard.no_progress_seconds, folder, rank)


def stop_request_of(run: Run) -> StopRequest:
    """The wish to end the run before its last step."""
    return StopRequest(Path(run.config.run.output_dir))


def set_learning_rates(
    generator: DeepSpeedEngine,
    discriminator: DeepSpeedEngine | None,
    losses: LossConfig,
    step: int,
) -> None:
    """Give both engines the learning rates of `step`, counted from 0, the next to be taken."""
    from vqrae_ds.sharding.parameter_groups import set_learning_rate

    set_learning_rate(generator, step)
    if discriminator is not None:
        first = losses.adversarial.first_discriminator_step
        set_learning_rate(discriminator, max(step - first, 0))


class _Start(NamedTuple):
    """Where the run stands before its next step."""

    state: TrainState
    extra: dict[str, Any]  # what the checkpoint keeps beside the engines
    pretrained: FileRecord | None


def _resume(
    run: Run,
    folder: Path,
    index: ShardIndex | None,
    generator: DeepSpeedEngine,
    discriminator: DeepSpeedEngine | None,
    ema: WeightAverage | None,
) -> _Start:
    """Go on from a checkpoint."""
    from vqrae_ds import checkpoint
    from vqrae_ds.data.opening import check_same_data

    watchdog.begin(f"the loading of {folder}")
    seed = run.config.run.seed
    start = _Start(*checkpoint.resume(folder, generator, discriminator, ema, seed=seed))
    set_learning_rates(generator, discriminator, run.config.losses, start.state.step)
    if index is not None:
        check_same_data(index, start.extra)
    if start.pretrained is not None:
        return start
    return start._replace(pretrained=_write_pretrained(run, generator))


def _begin(run: Run, ranks: Ranks, index: ShardIndex | None, generator: DeepSpeedEngine) -> _Start:
    """Begin at step 0, with the statistics of the features where weights do not bring them."""
    from vqrae_ds import checkpoint
    from vqrae_ds.calibration import calibrate

    if _needs_calibration(run):
        images = _training_batches(run, ranks, index, start=0)
        images = watchdog.watching(images, "the calibration")
        num_images = run.config.run.calibration_images
        calibrate(generator, images, num_images, ranks.device, ranks.data_size)
    return _Start(checkpoint.TrainState(), {}, _write_pretrained(run, generator))


def _write_pretrained(run: Run, generator: DeepSpeedEngine) -> FileRecord | None:
    """The run's file of the frozen weights, which its checkpoints refer to."""
    from vqrae_ds import checkpoint

    watchdog.begin("the writing of the frozen weights")
    return checkpoint.write_pretrained(run, generator)


class _Indices(NamedTuple):
    training: ShardIndex | None  # None for shards that are streamed
    validation: ShardIndex | None


def _open_indices(data: DataConfig, ranks: Ranks) -> _Indices:
    """What the shards hold. Each rank may look at other shards, and all fail together."""
    from vqrae_ds.data.opening import Reader, open_index
    from vqrae_ds.ranks import failing_together

    reader = Reader.of(ranks)
    with failing_together():
        training = None if data.streaming is not None else _open_training_index(data, reader)
        validation = data.validation and open_index(
            data.validation, data, reader, setting="data.validation"
        )
    return _Indices(training, validation)


def _open_training_index(data: DataConfig, reader: Reader) -> ShardIndex:
    from vqrae_ds.data.opening import open_index

    index = open_index(data.train, data, reader)
    if data.samples_per_epoch not in (None, index.num_samples):
        logger.warning(
            "data.samples_per_epoch is %d, and %s has %d samples: epochs count the former",
            *(data.samples_per_epoch, data.train, index.num_samples),
        )
    return index


def _objective(
    run: Run, ranks: Ranks, discriminator: DeepSpeedEngine | None, stop: StopVote
) -> tuple[Objective, PerceptualLoss | None]:
    from vqrae_ds.losses.convnext import ConvNextLoss
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.losses.perceptual import PerceptualLoss

    losses, perceptual, convnext = run.config.losses, None, None
    if losses.perceptual is not None:
        weights = losses.perceptual.weights
        perceptual = PerceptualLoss(weights and Path(weights)).to(ranks.device)
    if losses.convnext is not None:
        weights = losses.convnext.weights
        convnext = ConvNextLoss(weights and Path(weights)).to(ranks.device)
    module = discriminator and discriminator.module
    return Objective(losses, perceptual, convnext, module, stop.mean_over_ranks), perceptual


def _needs_calibration(run: Run) -> bool:
    """Weights that were trained before bring the statistics of their features with them."""
    config = run.config
    is_first = config.stage == 1 and not (config.init.model or config.init.from_run)
    return is_first and config.model.standardization == "calibrated"


def _training_batches(
    run: Run, ranks: Ranks, index: ShardIndex | None, *, start: int
) -> Iterator[Batch]:
    from vqrae_ds.data.opening import Reader, open_training

    return open_training(
        run.config.data,
        index,
        Reader.of(ranks),
        image_size=run.config.model.image_size,
        micro_batch_size=run.schedule.batch.micro_batch,
        seed=run.config.run.seed,
        start=start,
    )
