"""Checkpoint folders in DeepSpeed's file layout, made without DeepSpeed: small, fast, of any size.

That the layout is the real one is proved by `tests/integration/test_conversion_zero.py`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import build_model
from vqrae_ds.manifest import (
    FileRecord,
    Manifest,
    hash_file,
    list_files,
    read_manifest,
    write_manifest,
)
from vqrae_ds.models.vqrae import VQRAE, config_json

Tensors = dict[str, torch.Tensor]

TRAINED = {
    "vqrae.decoder.weight": torch.randn(5, 7),
    "vqrae.decoder.scale": torch.randn(()),  # fewer elements than ranks
    "vqrae.decoder.bias": torch.randn(13),
}
FROZEN = {
    "vqrae.encoder.weight": torch.randn(11, 3).bfloat16(),
    "vqrae.encoder.empty": torch.empty(0, 4, dtype=torch.bfloat16),
    "teacher.weight": torch.randn(4, 4).bfloat16(),
}
PRETRAINED = ("vqrae.encoder.weight", "vqrae.encoder.empty")
BUFFERS = {
    "vqrae.mean": torch.randn(3),
    "vqrae.half_mean": torch.randn(3).bfloat16(),
    "vqrae.count": torch.tensor(3),
    "vqrae.used": torch.tensor([True, False, True]),
}


def write_step(
    folder: Path,
    trained: Tensors,
    frozen: Tensors,
    buffers: Tensors,
    *,
    world_size: int = 3,
    step: int = 1000,
) -> Path:
    """A step folder as the trainer leaves it, without a discriminator; returns `folder`."""
    write_zero3(folder / "generator", trained, frozen, buffers, world_size=world_size, step=step)
    (folder / "model_config.json").write_text('{"image_size": 448,  "b": 1}')
    (folder / "trainer_state.json").write_text(json.dumps({"step": step, "stage": 1}))
    seal(folder, step=step, world_size=world_size)
    return folder


def write_model_step(folder: Path, *, step: int = 1000, world_size: int = 2) -> VQRAE:
    """The step folder of a tiny model, as stage 1 leaves it: averages, random states, everything.

    Returns the model in the values of the checkpoint: its frozen encoder is rounded to bf16.
    """
    model = build_model(seed=step).requires_grad_(False)
    for parameter in model.encoder.parameters():
        parameter.copy_(parameter.bfloat16())
    tensors = {f"vqrae.{name}": tensor for name, tensor in model.state_dict().items()}
    buffers = {f"vqrae.{name}" for name, _ in model.named_buffers()}
    frozen = {n: t.bfloat16() for n, t in tensors.items() if n.startswith("vqrae.encoder.")}
    trained = {n: t for n, t in tensors.items() if n not in buffers and n not in frozen}
    held = {n: t for n, t in tensors.items() if n in buffers}
    write_zero3(folder / "generator", trained, frozen, held, world_size=world_size, step=step)
    discriminator = {"stem.weight": torch.randn(4, 3), "stem.bias": torch.randn(4)}
    write_zero3(folder / "discriminator", discriminator, {}, {}, world_size=world_size, step=step)
    write_averages(folder, {n: t + 1 for n, t in trained.items()}, world_size=world_size)
    for rank in range(world_size):
        torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_rank_{rank:05d}.pt")
    (folder / "model_config.json").write_text(config_json(model.config))
    (folder / "run.json").write_text('{"stage": 1}')
    (folder / "trainer_state.json").write_text(json.dumps({"step": step, "stage": 1}))
    seal(folder, step=step, world_size=world_size)
    return model.eval()


def seal(
    folder: Path, *, step: int = 1000, world_size: int = 3, frozen: FileRecord | None = None
) -> None:
    """Write the manifest of `folder` as it is now; what one there says of frozen weights stays."""
    if frozen is None and (folder / "manifest.json").is_file():
        frozen = read_manifest(folder).frozen
    files = {name: hash_file(folder / name) for name in list_files(folder)}
    write_manifest(folder, Manifest(step, 1, world_size, {"torch": "2"}, files, frozen))


def write_split_step(run_folder: Path, step: int = 1000) -> Path:
    """A step folder whose frozen weights are in files of their own; returns it.

    Those in `PRETRAINED` lie once in the run, the others in the engine's folder.
    """
    folder = run_folder / "checkpoints" / f"step_{step:08d}"
    write_zero3(folder / "generator", TRAINED, None, BUFFERS, world_size=3)
    save_file(
        {n: t for n, t in FROZEN.items() if n not in PRETRAINED},
        folder / "generator" / "frozen.safetensors",
    )
    (run_folder / "frozen").mkdir(exist_ok=True)
    written = run_folder / "frozen" / "new"
    save_file({n: FROZEN[n] for n in PRETRAINED}, written)
    record = hash_file(written)
    written.rename(run_folder / "frozen" / f"{record.xxh3_128}.safetensors")
    (folder / "model_config.json").write_text('{"image_size": 448,  "b": 1}')
    seal(folder, step=step, frozen=record)
    return folder


def write_zero3(
    folder: Path,
    trained: Tensors,
    frozen: Tensors | None,
    buffers: Tensors,
    *,
    world_size: int,
    step: int = 1000,
) -> None:
    """The ZeRO-3 files of one engine; each trained tensor in a sub-group of its own.

    Without `frozen` they are as after `exclude_frozen_parameters`.
    """
    folder.mkdir(parents=True)
    left_out = {"frozen_param_shapes": None, "frozen_param_fragments": None}
    frozen, excluded = (frozen, {}) if frozen is not None else ({}, left_out)
    for rank in range(world_size):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        placeholders = {name: torch.empty(0) for name in [*trained, *frozen]}
        model = {
            "module": OrderedDict(**buffers, **placeholders),
            "buffer_names": list(buffers),
            "param_shapes": [OrderedDict({n: t.shape}) for n, t in trained.items()],
            "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in frozen.items()),
            "frozen_param_fragments": {
                n: _share(t, rank, world_size, poison=3e9) for n, t in frozen.items()
            },
            "shared_params": {},
            "global_steps": step,
            "skipped_steps": 0,
            "ds_version": "0.19.8",
            **excluded,
        }
        torch.save(model, folder / f"{name}_model_states.pt")
        flats = [_share(t, rank, world_size, poison=3e9) for t in trained.values()]
        adam = {"state": {i: {"step": torch.tensor(float(step))} for i in range(len(flats))}}
        state = {
            "partition_count": world_size,
            "zero_stage": 3,
            "fp32_flat_groups": flats,
            "optimizer_state_dict": adam,
        }
        torch.save({"optimizer_state_dict": state}, folder / f"{name}_optim_states.pt")


def write_averages(folder: Path, trained: Tensors, *, world_size: int = 3) -> None:
    """The moving averages of `trained`, a file a rank, beside what `write_step` wrote."""
    for rank in range(world_size):
        flats = [_share(t, rank, world_size, poison=3e9) for t in trained.values()]
        torch.save({"averages": flats}, folder / f"ema_rank_{rank:05d}.pt")


def expected(cast: torch.dtype | None) -> Tensors:
    """What a conversion of all three holds: parameters cast, buffers in fp32 or integers."""
    parameters = {n: t.to(cast or t.dtype) for n, t in (TRAINED | FROZEN).items()}
    buffers = {n: t.float() if t.is_floating_point() else t for n, t in BUFFERS.items()}
    tensors = parameters | buffers
    return {n.removeprefix("vqrae."): t for n, t in tensors.items() if n.startswith("vqrae.")}


def assert_identical(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def _share(tensor: torch.Tensor, rank: int, world_size: int, *, poison: float) -> torch.Tensor:
    """The rank's share; padded with a number that must not be seen again."""
    share = -(-tensor.numel() // world_size)
    padded = torch.full((share * world_size,), poison, dtype=tensor.dtype)
    padded[: tensor.numel()] = tensor.reshape(-1)
    return padded[rank * share : (rank + 1) * share].clone()
