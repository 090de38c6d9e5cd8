"""The smallest whole setting: a model of a few blocks, its configuration files, its weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from vqrae_ds.config import GuardConfig, ModelConfig, Run, read_run
from vqrae_ds.models.discriminator import PatchDiscriminator
from vqrae_ds.models.vqrae import VQRAE

if TYPE_CHECKING:
    from vqrae_ds.preparation import Setup

IMAGE_SIZE, PATCH_SIZE, NUM_CODES = 32, 8, 64

ENCODER = {
    "model_type": "internvl_vision",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": [IMAGE_SIZE, IMAGE_SIZE],
    "patch_size": [PATCH_SIZE, PATCH_SIZE],
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "layer_scale_init_value": 0.1,
    "initializer_range": 0.1,
    "use_mean_pooling": True,
}
MODEL = {"image_size": IMAGE_SIZE, "num_embeddings": NUM_CODES, "embedding_dim": 16}
GAN = {"channels": 8, "num_layers": 2}

DEEPSPEED = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class PlainEngine(nn.Module):
    """What a DeepSpeed engine looks like from outside."""

    mpu = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


def build_model(seed: int = 0, fields: dict[str, Any] | None = None, **options: Any) -> VQRAE:
    """A model with random weights, position embeddings and feature statistics included.

    `fields` take the place of those of `MODEL`.
    """
    torch.manual_seed(seed)
    config = ModelConfig(encoder_config=ENCODER, **MODEL | (fields or {}))
    model = VQRAE(config=config, **options)
    with torch.no_grad():
        model.standardize.mean.normal_()
        model.standardize.std.uniform_(0.5, 2)
        embeddings = model.encoder.model.embeddings
        embeddings.cls_token.normal_()
        embeddings.position_embeddings.normal_(std=0.5)
    return model


def save_initial(folder: Path, fields: dict[str, Any] | None = None) -> None:
    """A consolidated folder to start from, discriminator included."""
    build_model(fields=fields).save_pretrained(folder)
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(**GAN)
    save_file(discriminator.state_dict(), folder / "discriminator.safetensors")


def make_rank_folders(folder: Path, ranks: int) -> None:
    """A folder a rank, each with the weights to start from."""
    for rank in range(ranks):
        (folder / f"rank{rank}").mkdir()
        save_initial(folder / f"rank{rank}" / "initial")


def make_run(
    folder: Path,
    stage: int,
    *,
    losses: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
    world_size: int = 2,
    **sections: dict[str, Any],
) -> Run:
    """A checked run, its files in `folder`, that starts from `save_initial(folder / "initial")`."""
    (folder / "encoder").mkdir(exist_ok=True)
    (folder / "encoder" / "config.json").write_text(json.dumps(ENCODER))
    config = {
        "stage": stage,
        "run": {"output_dir": str(folder / f"stage{stage}"), "total_steps": 1000},
        "model": {**MODEL, "encoder_config_path": str(folder / "encoder")},
        "init": {"model": str(folder / "initial")},
        "losses": losses or {},
        "data": {"train": str(folder), "num_workers": 0},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    merged = copy.deepcopy(DEEPSPEED) | (deepspeed or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "deepspeed.json").write_text(json.dumps(merged))
    return read_run(folder / "config.yaml", folder / "deepspeed.json", world_size=world_size)


def make_setup(run: Run, perceptual: nn.Module | None = None) -> Setup:
    """Engines and all that the trainer's own steps need, without data."""
    from vqrae_ds import engines
    from vqrae_ds.losses.objective import Objective
    from vqrae_ds.sharding.ema import WeightAverage

    config = run.config
    generator, discriminator = engines.build_generator(run), engines.build_discriminator(run)
    module = discriminator and discriminator.module
    objective = Objective(config.losses, perceptual, None, module, engines.mean_over_ranks)
    setup = setup_of(generator, discriminator, objective, config.guard)
    if config.ema is not None:
        setup = setup._replace(ema=WeightAverage(generator, config.ema.decay))
    return setup._replace(perceptual=perceptual)


def setup_of(
    generator: Any, discriminator: Any, objective: Any, guard: GuardConfig | None = None
) -> Setup:
    """What the trainer's own steps need, around engines that are there."""
    from vqrae_ds.checkpoint import TrainState
    from vqrae_ds.data.bad_data import BadData
    from vqrae_ds.guard import Guard
    from vqrae_ds.preparation import Setup

    return Setup(
        ranks=None,
        generator=generator,
        discriminator=discriminator,
        objective=objective,
        perceptual=None,
        guard=Guard(guard or GuardConfig()),
        bad_data=BadData(max_share=0.01),
        stop=None,
        ema=None,
        batches=iter(()),
        num_samples=0,
        validation_index=None,
        state=TrainState(),
    )


def random_images(
    height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, batch: int = 2
) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1], the same at every call."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def images_of(step: int, rank: int, batch: int = 2) -> torch.Tensor:
    """The images of a rank at a step: smooth, so that the perceptual loss has something to see."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
