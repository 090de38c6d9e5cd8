"""The runs that the benchmark of a training step times: files, data and first weights of each.

Every loss has the weight 1, so that a loop without weights is the same training. LPIPS is left out:
it is one and the same call in both loops, takes most of a step of this size, and would hide what is
measured. All else is as the configuration has it by default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from PIL import Image

from vqrae_ds.benchmarks.launch import Machine
from vqrae_ds.config import ModelConfig, Run, read_run
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.models.vqrae import VQRAE

Case = Literal["stage1_gan", "stage2"]

NUM_IMAGES = 256


class Size(NamedTuple):
    """Of the encoder, which the decoder mirrors, of its images in pixels, and of the rest."""

    width: int
    blocks: int
    heads: int
    image_size: int
    patch_size: int
    embedding_dim: int
    micro_batch: int
    num_workers: int


# A step of 50 ms or more. On the CPU images are decoded in the loop: a loader's processes would
# take turns with the ranks on its cores, and the figures would be those of the turns.
SIZES = {
    "cpu": Size(128, 3, 4, 64, 8, 64, micro_batch=8, num_workers=0),
    "cuda": Size(768, 12, 12, 224, 14, 768, micro_batch=64, num_workers=4),
}
LOSSES: dict[Case, dict[str, Any]] = {
    "stage1_gan": {
        "perceptual": None,
        "adversarial": {"weight": 1.0, "channels": 32, "num_layers": 2},
    },
    "stage2": {"perceptual": None},
}


def write_run(
    folder: Path, case: Case, machine: Machine, total_steps: int, size: Size | None = None
) -> Run:
    """Write files, data and first weights into `folder`; nothing is due before the last step.

    Without a `size` it is that of `SIZES`.
    """
    size = size or SIZES[machine.device_type]
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text(json.dumps(_encoder(size)))
    model = {
        "encoder_config_path": str(folder / "encoder"),
        "embedding_dim": size.embedding_dim,
    }
    VQRAE(config=ModelConfig(**model)).save_pretrained(folder / "initial")
    config = {
        "stage": 1 if case == "stage1_gan" else 2,
        "run": {"output_dir": str(folder / "run"), "total_steps": total_steps},
        "model": model,
        "init": {"model": str(folder / "initial")},
        "losses": LOSSES[case],
        "data": {"train": str(folder / "data"), "num_workers": size.num_workers},
        "checkpoint": {"every_steps": total_steps},
        "monitor": {"log_every_steps": total_steps},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "deepspeed.json").write_text(json.dumps(_deepspeed(size, machine)))
    _write_data(folder, size)
    files = (folder / "config.yaml", folder / "deepspeed.json")
    return read_run(*files, world_size=machine.num_ranks)


def _encoder(size: Size) -> dict[str, Any]:
    return {
        "model_type": "internvl_vision",
        "hidden_size": size.width,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "image_size": [size.image_size, size.image_size],
        "patch_size": [size.patch_size, size.patch_size],
        "attention_bias": False,
        "use_qk_norm": True,
        "norm_type": "rms_norm",
        "layer_scale_init_value": 0.1,
    }


def _deepspeed(size: Size, machine: Machine) -> dict[str, Any]:
    config = {
        "train_batch_size": size.micro_batch * machine.num_ranks,
        "train_micro_batch_size_per_gpu": size.micro_batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    if machine.device_type == "cpu":
        return config
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    overlapping = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True}
    return config | bf16 | {"zero_optimization": overlapping}


def _write_data(folder: Path, size: Size) -> None:
    """Noise in patches: no photographs, but decoding, cropping and resizing cost the same."""
    images = folder / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 16, 16, 3), dtype=np.uint8)
    side = size.image_size * 5 // 4
    for number, pixels in enumerate(noise):
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(images / f"{number:04d}.jpg")
    write_shards(
        find_images(images), folder / "data", samples_per_shard=NUM_IMAGES // 4, root=images
    )
