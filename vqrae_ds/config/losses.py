"""The YAML's section `losses`: every term with its weight and start step."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from vqrae_ds.config.checking import NotNegative, Positive, Section, Text, Weight


class LossTerm(Section):
    """What every term has: its weight, and the first step in which it takes part."""

    weight: Weight = 1.0
    start_step: NotNegative = 0


class ReconstructionConfig(LossTerm):
    """Mean squared error of pixels in [0, 1]."""


class PerceptualConfig(LossTerm):
    """LPIPS with VGG16, evaluated on every `every_steps`-th step with as many times the weight."""

    every_steps: Positive = 1
    # A file of tools/make_lpips_weights.py; torchvision's cache if left out.
    weights: Text | None = None


class ConvNextConfig(LossTerm):
    """Mean squared error of ConvNeXt-S logits at 224 px, as in the code that the paper builds on.

    Evaluated on the same steps as `every_steps` says, with as many times the weight.
    """

    weight: Weight = 0.1
    every_steps: Positive = 1
    # convnext_small-0c510722.pth of torchvision, or safetensors; its cache if left out.
    weights: Text | None = None


class AdversarialConfig(LossTerm):
    """A discriminator with hinge losses.

    `patch` is pix2pix's and VQGAN's; `blur_pool` is that of the code that the paper builds on.
    """

    weight: Weight = 0.1
    # First step that trains the discriminator. At `start_step`, the same if this is left out, the
    # generator begins to see it.
    discriminator_start_step: NotNegative | None = None
    adaptive: bool = True  # scale by the ratio of gradient norms at the decoder's last layer
    discriminator: Literal["patch", "blur_pool"] = "patch"
    channels: Positive = 64
    num_layers: Positive = 3
    lecam_weight: Weight = 0.0  # LeCam regularisation of the discriminator (arXiv:2104.03310)

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


class QuantizerLossConfig(LossTerm):
    """The SimVQ loss."""


class DistillationTerm(LossTerm):
    """`l2` is the mean squared error, `cosine` one minus the mean cosine of the tokens."""

    distance: Literal["l2", "cosine"] = "l2"


class DistillationConfig(Section):
    """Stage 2.

    `quantized` pulls the projected code to the continuous feature, `teacher` the feature to that
    of the encoder before the stage. With a weight of 0 the teacher is there for validation alone.
    """

    quantized: DistillationTerm = DistillationTerm()
    teacher: DistillationTerm = DistillationTerm()


class LossConfig(Section):
    """Every term with its weight and start step. null switches an optional one off."""

    reconstruction: ReconstructionConfig = ReconstructionConfig()
    perceptual: PerceptualConfig | None = PerceptualConfig()
    convnext: ConvNextConfig | None = None
    quantizer: QuantizerLossConfig = QuantizerLossConfig()
    adversarial: AdversarialConfig | None = None
    distillation: DistillationConfig | None = None
