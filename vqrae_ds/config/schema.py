"""What the YAML may say: one frozen section a topic, unknown keys refused.

Numbers that DeepSpeed users expect in the DeepSpeed JSON (batch sizes, optimizer, learning rate,
scheduler, clipping, precision, ZeRO) have no field here, so that no number can be claimed twice.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from vqrae_ds.config.checking import NotNegative, Positive, Section, Text, Weight, show
from vqrae_ds.config.model import ModelConfig

Share = Annotated[float, Field(gt=0, le=1)]


class InitConfig(Section):
    """Where the first weights come from. A checkpoint of this run's own always comes first."""

    model: Text | None = None  # consolidated folder: tools/convert_checkpoint.py --to stage2
    encoder_weights: Text | None = None  # pretrained encoder folder
    allow_untrained_encoder: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> InitConfig:
        if self.model and self.encoder_weights:
            raise ValueError(
                f"encoder_weights = {show(self.encoder_weights)} is set beside init.model, "
                "whose folder holds the encoder already: remove one of the two"
            )
        return self


class ReconstructionConfig(Section):
    """Mean squared error of pixels in [0, 1]."""

    weight: Weight = 1.0
    start_step: NotNegative = 0


class PerceptualConfig(Section):
    """LPIPS with VGG16, evaluated on every `every_steps`-th step with as many times the weight."""

    weight: Weight = 1.0
    start_step: NotNegative = 0
    every_steps: Positive = 1
    # A file of tools/make_lpips_weights.py; torchvision's cache if left out.
    weights: Text | None = None


class AdversarialConfig(Section):
    """Patch discriminator with hinge losses."""

    weight: Weight = 0.1
    start_step: NotNegative = 0  # first step at which the generator sees the discriminator
    # First step that trains the discriminator; `start_step` if left out.
    discriminator_start_step: NotNegative | None = None
    adaptive: bool = True  # scale by the ratio of gradient norms at the decoder's last layer
    channels: Positive = 64
    num_layers: Positive = 3

    @model_validator(mode="after")
    def _trained_before_used(self) -> AdversarialConfig:
        if self.first_discriminator_step > self.start_step:
            raise ValueError(
                f"discriminator_start_step = {self.discriminator_start_step} is after start_step "
                f"{self.start_step}: the generator would follow an untrained discriminator"
            )
        return self

    @property
    def first_discriminator_step(self) -> int:
        """The step at which the discriminator starts to train."""
        first = self.discriminator_start_step
        return self.start_step if first is None else first


class QuantizerLossConfig(Section):
    """The SimVQ loss."""

    weight: Weight = 1.0
    start_step: NotNegative = 0


class DistillationTerm(Section):
    """Weight and start of one distillation term."""

    weight: Weight = 1.0
    start_step: NotNegative = 0


class DistillationConfig(Section):
    """Stage 2.

    `quantized` pulls the projected code to the continuous feature, `teacher` the feature to that
    of the encoder before the stage.
    """

    quantized: DistillationTerm = DistillationTerm()
    teacher: DistillationTerm = DistillationTerm()


class LossConfig(Section):
    """Every term with its weight and start step. null switches an optional one off."""

    reconstruction: ReconstructionConfig = ReconstructionConfig()
    perceptual: PerceptualConfig | None = PerceptualConfig()
    quantizer: QuantizerLossConfig = QuantizerLossConfig()
    adversarial: AdversarialConfig | None = None
    distillation: DistillationConfig | None = None


class LearningRateMultiplierConfig(Section):
    """Factors on the learning rate of the DeepSpeed JSON, one a part."""

    encoder: Weight = 1.0
    quantizer: Weight = 1.0
    decoder: Weight = 1.0
    discriminator: Weight = 1.0


class DataConfig(Section):
    """Folders of tar shards with an index, as tools/make_shards.py writes them."""

    train: Text
    validation: Text | None = None
    samples_per_epoch: Positive | None = None  # needed where the length is given in epochs
    num_workers: NotNegative = 4  # loader processes a rank
    # Share of the largest centre square that a random square crop covers.
    crop_scale_min: Share = 0.5
    crop_scale_max: Share = 1.0
    horizontal_flip: bool = True

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

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if self.epochs is None and self.total_steps is None:
            raise ValueError("total_steps is missing, and so is run.epochs: set one of the two")
        if self.epochs is not None and self.total_steps is not None:
            raise ValueError(
                f"total_steps = {self.total_steps} is set, and so is run.epochs = {self.epochs}: "
                "remove one of the two"
            )
        return self


class CheckpointConfig(Section):
    """A checkpoint every `every_steps` steps and at the end; the last `keep_last` are kept."""

    every_steps: Positive = 1000
    keep_last: Positive = 3


class MonitorConfig(Section):
    """Intervals of what is shown."""

    log_every_steps: Positive = 20
    validate_every_steps: Positive = 1000  # figures and an image grid of the validation set
    num_images: Positive = 8  # of the grid
    usage_window_tokens: Positive = 100_000  # tokens over which codebook usage is counted


class TrainConfig(Section):
    """The whole YAML."""

    stage: Annotated[int, Field(ge=1, le=2)]
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    init: InitConfig = InitConfig()
    losses: LossConfig = LossConfig()
    lr_multiplier: LearningRateMultiplierConfig = LearningRateMultiplierConfig()
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
            init.encoder_weights or init.model or init.allow_untrained_encoder
        ):
            raise ValueError(
                "init.encoder_weights is missing: name the folder of a pretrained encoder, "
                "or set init.allow_untrained_encoder: true to train on a random one"
            )
        if self.stage == 2 and init.model is None:
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
