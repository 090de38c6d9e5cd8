"""What the model YAML may say: one frozen pydantic model a section, unknown keys refused.

Numbers that DeepSpeed users expect in the DeepSpeed JSON (batch sizes, optimizer, learning rate, scheduler,
clipping, precision, ZeRO) have no field here, so that no number can be claimed twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Strict, frozen, no unknown keys: `"16"` is not a number and a misspelt key is not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DecoderConfig(Section):
    """The ViT decoder. A field left out mirrors the encoder, which makes the tokenizer symmetric."""

    hidden_size: Positive | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    intermediate_size: Positive | None = None
    norm_type: Literal["layer_norm", "rms_norm"] | None = None
    use_qk_norm: bool | None = (
        None  # per head, so that heads can be split over a tensor-parallel group
    )
    layer_scale_init_value: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.hidden_size and self.num_heads and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        return self


class ModelConfig(Section):
    """The tokenizer. `encoder_config_path` names a folder with the encoder's `config.json` (Hugging Face layout).

    Once resolved (`resolve_model`) the encoder's configuration is inside, and the path is no longer needed.
    """

    encoder_cls: Literal["InternViT"] = "InternViT"
    encoder_config_path: str | None = None
    encoder_config: dict[str, Any] | None = None
    image_size: Positive | None = None  # side of input and output in pixels; the encoder's own
    num_embeddings: Annotated[int, Field(ge=2)] = 16384
    embedding_dim: Positive = 1536
    commitment_cost: Weight = 0.25
    legacy: bool = True  # which side of the SimVQ loss the commitment cost scales (models/simvq.py)
    use_simvq: Literal[True] = True
    decoder: DecoderConfig = DecoderConfig()

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels, of the encoder and of the decoder. Needs a resolved configuration."""
        assert self.encoder_config is not None, "resolve_model comes first"
        return _side(self.encoder_config["patch_size"])

    @model_validator(mode="after")
    def _one_encoder(self) -> ModelConfig:
        if (self.encoder_config_path is None) == (self.encoder_config is None):
            raise ValueError(
                "encoder_config_path is required (a folder with the encoder's config.json)"
            )
        return self


class InitConfig(Section):
    """Where the first weights come from. A checkpoint of this run's own always comes first."""

    model: str | None = None  # consolidated folder: tools/convert_checkpoint.py --to stage2
    encoder_weights: str | None = None  # pretrained encoder folder
    allow_untrained_encoder: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> InitConfig:
        if self.model and self.encoder_weights:
            raise ValueError(
                "model and encoder_weights are both set; the folder of `model` holds the encoder already"
            )
        return self


class ReconstructionConfig(Section):
    """Mean squared error of pixels in [0, 1]."""

    weight: Weight = 1.0
    start_step: NotNegative = 0


class PerceptualConfig(Section):
    """LPIPS with VGG16. `every_steps` > 1 evaluates it on every k-th step, with k times the weight."""

    weight: Weight = 1.0
    start_step: NotNegative = 0
    every_steps: Positive = 1
    weights: str | None = (
        None  # file of tools/make_lpips_weights.py; torchvision's cache if left out
    )


class AdversarialConfig(Section):
    """Patch discriminator with hinge losses."""

    weight: Weight = 0.1
    start_step: NotNegative = 0  # first step at which the generator sees the discriminator
    discriminator_start_step: NotNegative | None = (
        None  # first step that trains it; `start_step` if left out
    )
    adaptive: bool = True  # scale by the ratio of gradient norms at the decoder's last layer
    channels: Positive = 64
    num_layers: Positive = 3

    @model_validator(mode="after")
    def _trained_before_used(self) -> AdversarialConfig:
        if (
            self.discriminator_start_step is not None
            and self.discriminator_start_step > self.start_step
        ):
            raise ValueError(
                f"discriminator_start_step {self.discriminator_start_step} is after start_step {self.start_step}: "
                "the generator would follow an untrained discriminator"
            )
        return self

    @property
    def first_discriminator_step(self) -> int:
        """The step at which the discriminator starts to train."""
        return (
            self.start_step
            if self.discriminator_start_step is None
            else self.discriminator_start_step
        )


class QuantizerLossConfig(Section):
    """The SimVQ loss."""

    weight: Weight = 1.0
    start_step: NotNegative = 0


class DistillationTerm(Section):
    """Weight and start of one distillation term."""

    weight: Weight = 1.0
    start_step: NotNegative = 0


class DistillationConfig(Section):
    """Stage 2. `quantized`: projected code -> continuous feature. `teacher`: feature -> first encoder's feature."""

    quantized: DistillationTerm = DistillationTerm()
    teacher: DistillationTerm = DistillationTerm()


class LossConfig(Section):
    """Every term with its weight and start step. A section set to null switches its term off."""

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

    train: str
    validation: str | None = None
    samples_per_epoch: Positive | None = None  # needed where the length is given in epochs
    num_workers: NotNegative = 4  # loader processes a rank
    crop_scale_min: Share = (
        0.5  # share of the largest centre square that a random square crop covers
    )
    crop_scale_max: Share = 1.0
    horizontal_flip: bool = True

    @model_validator(mode="after")
    def _crop_range(self) -> DataConfig:
        if self.crop_scale_min > self.crop_scale_max:
            raise ValueError(
                f"crop_scale_min {self.crop_scale_min} is above crop_scale_max {self.crop_scale_max}"
            )
        return self


class RunConfig(Section):
    """Length, place and seed of the run. Exactly one of `epochs` and `total_steps`."""

    output_dir: str
    epochs: Positive | None = None
    total_steps: Positive | None = None
    seed: NotNegative = 0
    calibration_images: NotNegative = (
        4096  # stage 1: images that set mean and scale of the features
    )
    collective_timeout_minutes: Positive = 30

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if (self.epochs is None) == (self.total_steps is None):
            raise ValueError(
                f"set exactly one of epochs ({self.epochs}) and total_steps ({self.total_steps})"
            )
        return self


class CheckpointConfig(Section):
    """A checkpoint every `every_steps` steps and at the end; older ones than the last `keep_last` are removed."""

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

    stage: Literal[1, 2]
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
        """The specification's recipe: GAN in stage 1, both distillation terms in stage 2."""
        if not isinstance(raw, dict) or not isinstance(raw.get("losses", {}), dict):
            return raw
        default = {1: "adversarial", 2: "distillation"}.get(raw.get("stage"))
        if default is None:
            return raw
        return {**raw, "losses": {default: {}, **raw.get("losses", {})}}

    @model_validator(mode="after")
    def _stage_fits(self) -> TrainConfig:
        if self.stage == 1 and self.losses.distillation is not None:
            raise ValueError(
                "losses.distillation is set in stage 1, where the encoder is frozen: remove it"
            )
        if self.stage == 2 and self.init.model is None:
            raise ValueError(
                "init.model is not set: stage 2 starts from a consolidated folder "
                "(python tools/convert_checkpoint.py RUN/checkpoints OUT --to stage2)"
            )
        if self.run.epochs is not None and self.data.samples_per_epoch is None:
            raise ValueError(
                f"data.samples_per_epoch is not set, and run.epochs is {self.run.epochs}: "
                "give the number of samples an epoch, or run.total_steps"
            )
        if self.stage == 1 and not (
            self.init.encoder_weights or self.init.model or self.init.allow_untrained_encoder
        ):
            raise ValueError(
                "init.encoder_weights is not set: name the folder of a pretrained encoder, "
                "or set init.allow_untrained_encoder: true to train on a random one"
            )
        return self


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Read the encoder's `config.json` and fill in what the decoder mirrors.

    Raises `ValueError` where the folder, a needed key or a divisibility is missing.
    """
    encoder = (
        model.encoder_config if model.encoder_config is not None else _read_encoder_config(model)
    )
    try:
        patch_size = _side(encoder["patch_size"])
        mirrored = {
            "hidden_size": encoder["hidden_size"],
            "num_layers": encoder["num_hidden_layers"],
            "num_heads": encoder["num_attention_heads"],
            "intermediate_size": encoder["intermediate_size"],
            "norm_type": encoder.get("norm_type", "layer_norm"),
            "use_qk_norm": encoder.get("use_qk_norm", False),
            "layer_scale_init_value": encoder.get("layer_scale_init_value", 0.1),
        }
    except KeyError as error:
        source = model.encoder_config_path or "encoder_config"
        raise ValueError(f"model.encoder_config_path: {source} has no key {error}") from error
    decoder = mirrored | model.decoder.model_dump(exclude_none=True)
    if decoder["hidden_size"] % decoder["num_heads"]:
        raise ValueError(
            f"model.decoder.num_heads: {decoder['num_heads']} heads do not divide hidden_size {decoder['hidden_size']}"
        )
    image_size = model.image_size or _side(encoder["image_size"])
    if image_size % patch_size:
        low = image_size // patch_size * patch_size
        raise ValueError(
            f"model.image_size: {image_size} is not a multiple of the encoder's patch size {patch_size}; "
            f"nearest sizes: {low} and {low + patch_size}"
        )
    return model.model_copy(
        update={
            "encoder_config": encoder,
            "encoder_config_path": None,
            "image_size": image_size,
            "decoder": DecoderConfig(**decoder),
        }
    )


def _read_encoder_config(model: ModelConfig) -> dict[str, Any]:
    path = Path(model.encoder_config_path) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.encoder_config_path: {path} does not exist")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model.encoder_config_path: {path} is not JSON: {error}") from error


def _side(size: int | list[int]) -> int:
    """Hugging Face writes patch sizes as a number or as [height, width]."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"model.encoder_config_path: size {size} is not square")
    return sides.pop()
