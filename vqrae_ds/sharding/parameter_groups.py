"""Which parameters the optimizer takes, with what weight decay and what learning rate, and when."""

from __future__ import annotations

from typing import Any

from torch import nn

from vqrae_ds.config import LearningRateMultiplierConfig
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.parallel.marks import is_split

PARTS = {  # part of `lr_multiplier` -> prefixes of parameter names
    "encoder": ("vqrae.encoder.",),
    "quantizer": ("vqrae.in_proj.", "vqrae.quantizer.", "vqrae.out_proj."),
    "decoder": ("vqrae.decoder.",),
}
UNDECAYED = ("position", "cls_token", "register_tokens")  # in names; vectors never decay


def parameter_groups(
    model: TrainingModel, optimizer_params: dict[str, Any], multiplier: LearningRateMultiplierConfig
) -> list[dict[str, Any]]:
    """One group a part and kind: no decay on norms, biases, scales, positions and extra tokens.

    What a tensor-parallel group divides is in groups of its own, marked "split": of all others
    each of its ranks has the same gradient.
    """
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(p for p, prefixes in PARTS.items() if name.startswith(prefixes))
            shape = getattr(parameter, "ds_shape", parameter.shape)
            decays = len(shape) >= 2 and not any(word in name for word in UNDECAYED)
            groups.setdefault((part, decays, is_split(parameter)), []).append(parameter)
    built = []
    for (part, decays, split), parameters in groups.items():
        rate = optimizer_params["lr"] * getattr(multiplier, part)
        group = {"params": parameters, "lr": rate, "part": part}
        if split:
            group["split"] = True
        if not decays:
            group["weight_decay"] = 0.0
        built.append(group)
    return built


def discriminator_groups(discriminator: nn.Module) -> list[dict[str, Any]]:
    """Two groups with the rate of the JSON: norms and biases do not decay."""
    parameters = list(discriminator.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rates(generator: Any, discriminator: Any | None) -> dict[str, float]:
    """The learning rate of each part, as the next step will use it."""
    rates = {group["part"]: group["lr"] for group in generator.optimizer.param_groups}
    if discriminator is not None:
        rates["discriminator"] = discriminator.optimizer.param_groups[0]["lr"]
    return rates


def set_learning_rate(engine: Any, step: int) -> None:
    """Schedule the step that comes next as the `step`-th of the engine, counted from 0.

    The discriminator counts from its own first step. Without a schedule the rate is constant.
    """
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step(step)
