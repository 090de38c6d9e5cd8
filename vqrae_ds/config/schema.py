"""What the YAML may say: one frozen section a topic, unknown keys refused.

Numbers that DeepSpeed users expect in the DeepSpeed JSON (batch sizes, optimizer, learning rate,
scheduler, clipping, precision, ZeRO) have no field here, so that no number can be claimed twice.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vqrae_ds.config.checking import (
    NotNegative,
    Positive,
    PositiveNumber,
    Section,
    Text,
    Texts,
    Weight,
    show,
)
from vqrae_ds.config.losses import LossConfig
from vqrae_ds.config.model import ModelConfig

Share = Annotated[float, Field(gt=0, le=1)]


class InitConfig(Section):
    """Where a run starts. The first of these that is there is taken:

    1. the newest intact checkpoint in `run.output_dir`: everything, to go on where it ended;
    2. `from_run`: the weights, not the optimizer, of another run's checkpoint;
    3. `model`: a consolidated folder, how stage 2 begins;
    4. `encoder_weights`: a pretrained encoder, the rest is drawn;
    5. nothing: all is drawn, which `allow_untrained_encoder` must confirm.

    Two of 2 to 4 are refused, for one of them would be ignored.
    """

    from_run: Text | None = None  # a run's folder, or one of its checkpoints
    model: Text | None = None  # consolidated folder: tools/convert_checkpoint.py --to stage2
    encoder_weights: Text | None = None  # pretrained encoder folder
    allow_untrained_encoder: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> InitConfig:
        given = [name for name in ("from_run", "model", "encoder_weights") if getattr(self, name)]
        if len(given) > 1:
            first, second = given[:2]
            raise ValueError(
                f"{second} = {show(getattr(self, second))} is set beside init.{first}, "
                "which holds the encoder already: remove one of the two"
            )
        return self


class LearningRateMultiplierConfig(Section):
    """Factors on the learning rate of the DeepSpeed JSON, one a part."""

    encoder: Weight = 1.0
    quantizer: Weight = 1.0
    decoder: Weight = 1.0
    discriminator: Weight = 1.0


class StreamingConfig(Section):
    """Shards without an index, by path or URL, drawn at random for ever (`data/streaming.py`)."""

    shuffle_samples: Positive = 2000  # that a loader process holds, to draw from


class DataConfig(Section):
    """Folders of tar shards with an index, as tools/make_shards.py writes them.

    Several are one data set: `data/part_{00..31}`, `[data/some, data/others]`, or `folders.txt`, a
    file with a path a line (`config/data_paths.py`). None may be named twice.

    With `bad_samples: refuse` a sample that cannot be used ends the run with its shard and key.
    With `skip` another one stands in for it; it is counted by its kind, and the run ends where the
    share of such samples among the last ones is above `max_bad_share`. Of shards that are streamed,
    it is their number to that of the good ones, and what is lost of a shard that is cut counts as
    one. Ranks of a tensor-parallel group skip nothing that one of them alone may lack: a shard that
    is missing, resized or unreadable ends the run there.
    """

    train: Texts
    validation: Texts | None = None
    streaming: StreamingConfig | None = None  # then `train` names shards
    samples_per_epoch: Positive | None = None  # needed where the length is given in epochs
    num_workers: NotNegative = 4  # loader processes a rank
    # Share of the largest centre square that a random square crop covers.
    crop_scale_min: Share = 0.5
    crop_scale_max: Share = 1.0
    horizontal_flip: bool = True
    # fast: JPEGs are decoded at a half, a quarter or an eighth where the crop is at least twice,
    # four or eight times the output; where it is smaller, as by exact
    decode: Literal["exact", "fast"] = "exact"
    bad_samples: Literal["refuse", "skip"] = "refuse"
    max_bad_share: Share = 0.01
    # More is refused before it is decoded; above twice the default, Pillow refuses by itself.
    max_image_pixels: Annotated[int, Field(gt=0, le=178_956_970)] = 89_478_485
    max_image_bytes: Positive = 67_108_864
    prefetch_batches: Positive = 2  # that each loader process is ahead

    @model_validator(mode="after")
    def _crop_range(self) -> DataConfig:
        if self.crop_scale_min > self.crop_scale_max:
            raise ValueError(
                f"crop_scale_min = {self.crop_scale_min} is above data.crop_scale_max = "
                f"{self.crop_scale_max}"
            )
        return self


class RunConfig(Section):
    """Length, place and seed of the run. Exactly one of `epochs` and `total_steps`."""

    output_dir: Text
    epochs: Positive | None = None
    total_steps: Positive | None = None
    seed: NotNegative = 0
    # Stage 1: images that set mean and scale of the features (model.standardization).
    calibration_images: Positive = 4096
    collective_timeout_minutes: Positive = 30
    deterministic: bool = False  # bit for bit the same on the same hardware, at some cost in speed
    # First and last step of a trace of rank 0, RUN/profile/, for chrome://tracing or Perfetto.
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _profile_window(self) -> RunConfig:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(
                f"profile_steps = {self.profile_steps} must be the first and the last step"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if self.epochs is None and self.total_steps is None:
            raise ValueError("total_steps is missing, and so is run.epochs: set one of the two")
        if self.epochs is not None and self.total_steps is not None:
            raise ValueError(
                f"total_steps = {self.total_steps} is set, and so is run.epochs = {self.epochs}: "
                "remove one of the two (run.total_steps=null, or run.epochs=null)"
            )
        return self


class MemoryConfig(Section):
    """What is kept on a GPU and what is computed or fetched again.

    Activation checkpointing keeps of each block its input alone (`full`), or its input and the
    results of matrix products and attention (`selective`), and computes the rest once more in the
    backward pass. The encoder's matters in stage 2 alone.

    A frozen encoder (stage 2: the teacher) is `sharded` over the ranks and gathered layer by layer
    in each forward, or `resident`, whole on every GPU, without that traffic.
    """

    encoder_checkpointing: Literal["none", "full", "selective"] = "none"
    decoder_checkpointing: Literal["none", "full", "selective"] = "none"
    frozen_encoder: Literal["sharded", "resident"] = "sharded"


class GuardConfig(Section):
    """When a step is not taken, and when a run ends by itself.

    A step is skipped on all ranks in which any loss of any rank is not finite, or in which the
    reconstruction, perceptual, ConvNeXt, quantizer, adversarial or discriminator loss of a micro
    batch is more than `spike_factor` times the largest healthy one of late, on whichever rank.
    """

    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 10.0  # null: off
    max_skipped_steps: Positive = 20  # in a row: then the run saves a checkpoint and ends
    no_progress_seconds: Positive = 1200  # then a rank dumps its stacks and ends the job


class EMAConfig(Section):
    """A moving average of the trained weights, in fp32, each rank its share.

    After each step it becomes decay * average + (1 - decay) * weight.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class CheckpointConfig(Section):
    """A checkpoint every `every_steps` steps and at the end.

    A save that fails, for want of space or by any other error of a file system on any rank, leaves
    a warning and the count `checkpoint/failed_saves`: training goes on, and the next save tries
    again. A run whose last save fails, three times, ends with exit status 1.

    With `local_dir` the ranks write there, training goes on, and a thread of each rank copies its
    files into the run's folder. A checkpoint exists once all are there, before the next save at the
    latest: a run that is killed may then lose the steps of two intervals instead of one. The end of
    a run waits.
    """

    every_steps: Positive = 1000
    keep_last: Positive = 3
    keep_every: Positive | None = None  # steps that it divides are kept for ever beside those
    local_dir: Text | None = None  # a fast disk of each node, with room for its ranks' share

    def most_at_once(self, total_steps: int) -> int:
        """The number of checkpoints that there must be room for in a run of so many steps.

        The last ones, the next one, written before the oldest of these goes, and those that stay
        for ever.
        """
        number = min(self.keep_last + 1, -(-total_steps // self.every_steps))
        return number + (0 if self.keep_every is None else total_steps // self.keep_every)

    @model_validator(mode="after")
    def _kept_are_saved(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.every_steps:
            raise ValueError(
                f"keep_every = {self.keep_every} is no multiple of checkpoint.every_steps = "
                f"{self.every_steps}: there is no checkpoint of every such step"
            )
        return self


class MonitorConfig(Section):
    """Intervals of what is shown."""

    log_every_steps: Positive = 20
    validate_every_steps: Positive = 1000  # figures and an image grid of the validation set
    num_images: Positive = 8  # of the grid
    usage_window_tokens: Positive = 100_000  # tokens over which codebook usage is counted
    # Peak of one GPU in TFLOP/s at the run's precision, for the MFU; found by its name if left out.
    peak_tflops: PositiveNumber | None = None


class TrainConfig(Section):
    """The whole YAML."""

    stage: Annotated[int, Field(ge=1, le=2)]
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    init: InitConfig = InitConfig()
    losses: LossConfig = LossConfig()
    lr_multiplier: LearningRateMultiplierConfig = LearningRateMultiplierConfig()
    ema: EMAConfig | None = None
    memory: MemoryConfig = MemoryConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="before")
    @classmethod
    def _stage_defaults(cls, raw: Any) -> Any:
        """The default recipe: GAN in stage 1, both distillation terms in stage 2."""
        if not isinstance(raw, dict) or not isinstance(raw.get("losses", {}), dict):
            return raw
        if raw.get("stage") not in (1, 2):
            return raw
        default = "adversarial" if raw["stage"] == 1 else "distillation"
        return {**raw, "losses": {default: {}, **raw.get("losses", {})}}

    @model_validator(mode="after")
    def _stage_fits(self) -> TrainConfig:
        init = self.init
        if self.stage == 1 and self.losses.distillation is not None:
            raise ValueError(
                "losses.distillation is set in stage 1, where the encoder is frozen: remove it"
            )
        distillation = self.losses.distillation
        if distillation and distillation.quantized.weight and not self.model.use_simvq:
            raise ValueError(
                f"losses.distillation.quantized.weight = {distillation.quantized.weight:g} has no "
                "effect with model.use_simvq = false, whose codes have no gradient: set it to 0"
            )
        if self.stage == 1 and not (
            init.encoder_weights or init.model or init.from_run or init.allow_untrained_encoder
        ):
            raise ValueError(
                "init.encoder_weights is missing: name the folder of a pretrained encoder, "
                "or set init.allow_untrained_encoder: true to train on a random one"
            )
        if self.stage == 2 and init.model is None and init.from_run is None:
            raise ValueError(
                "init.model is missing: stage 2 starts from a consolidated folder "
                "(python tools/convert_checkpoint.py RUN/checkpoints OUT --to stage2)"
            )
        if self.run.epochs is not None and self.data.samples_per_epoch is None:
            raise ValueError(
                f"data.samples_per_epoch is missing, and run.epochs is {self.run.epochs}: "
                "give the number of samples an epoch, or run.total_steps"
            )
        return self
