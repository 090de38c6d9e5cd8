"""Checkpoints of tp 2 x dp 2: resumed bit for bit, converted, and gone on from with another tp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed import gathered, run_ranks
from tests.tiny import GAN, images_of, make_run, make_setup, save_initial
from vqrae_ds import checkpoint
from vqrae_ds.config import Run
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.inspection import inspect
from vqrae_ds.manifest import Layout, read_manifest
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.parallel.slices import merge, split_of
from vqrae_ds.sharding import resident

pytestmark = pytest.mark.slow

RANKS, STEPS, MORE_STEPS = 4, 2, 2
FIELDS = {"decoder": {"num_heads": 4, "intermediate_size": 97}, "num_embeddings": 63}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
KINDS = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": ZERO_3},
    "zero3-offload": {
        "zero_optimization": ZERO_3 | {"offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "zero3-bf16-sums": {
        "zero_optimization": ZERO_3,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero1-bf16-sums": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}


def make(
    rank: int,
    folder: Path,
    kind: str,
    tensor_size: int,
    world_size: int = RANKS,
    *,
    stage: int = 1,
    deepspeed: dict[str, Any] | None = None,
    **sections: Any,
) -> Run:
    """The run of one kind, made on rank 0, the same on all.

    `deepspeed` takes the place of what KINDS has for it.
    """
    shared: list[Any] = [None]
    if rank == 0:
        batch = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "optimizer": ADAMW}
        batch |= {"tensor_parallel": {"autotp_size": tensor_size}}
        deepspeed = batch | (KINDS[kind] if deepspeed is None else deepspeed)
        options = {
            "losses": {"adversarial": GAN, "perceptual": None},
            "ema": {"decay": 0.7},
            "model": FIELDS,
        }
        options["run"] = {"output_dir": str(folder / kind)}
        if kind == "zero3-offload":
            options["memory"] = {"frozen_encoder": "resident"}
        options |= sections
        shared = [make_run(folder, stage, deepspeed=deepspeed, world_size=world_size, **options)]
    dist.broadcast_object_list(shared, 0)
    return shared[0]


def train(run: Run, setup: Any, rank: int, first: int, steps: int) -> list[dict[str, float]]:
    from vqrae_ds.train import finish_step, micro_step

    data_rank, losses = rank // run.schedule.batch.tensor_size, []
    for step in range(first, first + steps):
        for micro in range(run.schedule.batch.accumulation):
            terms, _ = micro_step(setup, images_of(10 * step + micro, data_rank, 1), step)
            losses.append({name: value.item() for name, value in terms.items()})
        finish_step(setup, step)
    return losses


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """All that is stored, as this rank's forward has it: slices of what its group divides."""
    with gathered(engine.module):
        held = engine.module.state_dict() | resident.state(engine.module)
        return {name: tensor.clone() for name, tensor in held.items()}


def masters_of(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in trained.items()}


def averages_of(setup: Any) -> dict[str, torch.Tensor]:
    """This rank's share of each, without the padding, which holds anything."""
    from vqrae_ds.sharding.partitions import layout

    vectors = zip(layout(setup.generator), setup.ema._averages, strict=True)
    return {p.name: vector[p.start : p.start + p.numel] for parts, vector in vectors for p in parts}


def train_save_resume(rank: int, folder: Path) -> None:
    for kind in KINDS:
        run = make(rank, folder, kind, 2)
        setup = make_setup(run)
        train(run, setup, rank, 0, STEPS)
        state = checkpoint.TrainState(STEPS, STEPS * 4)
        engines = (setup.generator, setup.discriminator)
        saved = checkpoint.save(run, checkpoint.Content(*engines, state, ema=setup.ema))
        held = {"weights": weights_of(setup.generator), "masters": masters_of(setup.generator)}
        torch.save(held, folder / kind / f"held{rank}.pt")
        expected = train(run, setup, rank, STEPS, MORE_STEPS)
        ends = weights_of(setup.generator), weights_of(setup.discriminator)

        again = make_setup(run)
        if kind == "zero3":
            refuse_another_tensor_size(rank, folder, saved, kind)
        resumed = checkpoint.resume(saved, again.generator, again.discriminator, again.ema)
        assert resumed.state == state
        assert_equal(weights_of(again.generator), held["weights"])
        assert train(run, again, rank, STEPS, MORE_STEPS) == expected, f"{kind}: losses"
        assert_equal(weights_of(again.generator), ends[0])
        assert_equal(weights_of(again.discriminator), ends[1])
        assert_equal(averages_of(again), averages_of(setup))


def resume_over_one_group(rank: int, folder: Path) -> None:
    """What tp 2 x dp 2 wrote into tp 2 x dp 1, whose ranks are those of the first group."""
    for kind in KINDS:
        run = make(rank, folder, kind, 2, world_size=2)
        setup = make_setup(run)
        saved = checkpoint.find(run)
        checkpoint.resume(saved, setup.generator, setup.discriminator, setup.ema)
        held = torch.load(folder / kind / f"held{rank}.pt", weights_only=True)
        assert_equal(weights_of(setup.generator), held["weights"])
        assert_equal(masters_of(setup.generator), held["masters"])
        train(run, setup, rank, STEPS, 1)


def refuse_another_tensor_size(rank: int, folder: Path, saved: Path, kind: str) -> None:
    run = make(rank, folder, kind, 4)
    setup = make_setup(run)
    with pytest.raises(ValueError, match=r"autotp_size = 2, and the run has 4: .* init.from_run"):
        checkpoint.resume(saved, setup.generator, setup.discriminator, setup.ema)
    with pytest.raises(ValueError, match=r"tensor_parallel.autotp_size = 4 differs from 2 in "):
        checkpoint.find(run)


def assert_equal(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(mine[name], tensor), name


def start_elsewhere(rank: int, folder: Path) -> None:
    """The consolidated folder, and the checkpoint as it is, into tp 1 and tp 4."""
    from deepspeed.utils import groups

    from vqrae_ds import engines

    for kind in ("zero1", "zero3"):
        inits = {
            "converted": {"model": str(folder / kind / "converted")},
            "from_run": {"model": None, "from_run": str(folder / kind)},
        }
        for label, init in inits.items():
            for tensor_size in (1, 4):
                output = {"output_dir": str(folder / f"{kind}-{label}-{tensor_size}")}
                run = make(rank, folder, kind, tensor_size, init=init, run=output)
                run = checkpoint.resolve_start(run)
                groups.mpu = None  # DeepSpeed keeps that of an engine before
                held = weights_of(engines.build_generator(run))
                torch.save(held, folder / kind / f"{label}-{tensor_size}-{rank}.pt")
    for tensor_size in (1, 2, 4):
        init = {"model": None, "allow_untrained_encoder": True}
        run = make(rank, folder, "zero3", tensor_size, init=init)
        groups.mpu = None
        held = weights_of(engines.build_generator(run))
        torch.save(held, folder / f"drawn-{tensor_size}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel_checkpoints")
    save_initial(folder / "initial", FIELDS)
    run_ranks(RANKS, train_save_resume, folder, timeout_seconds=400)
    for kind in KINDS:
        step = folder / kind / "checkpoints" / f"step_{STEPS:08d}"
        consolidate(step, folder / kind / "converted", to="stage2")
    run_ranks(2, resume_over_one_group, folder, timeout_seconds=400)
    run_ranks(RANKS, start_elsewhere, folder, timeout_seconds=400)
    return folder


def merged(files: list[Path], key: str | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors from what the ranks of a tensor group wrote."""
    ranks = [torch.load(file, weights_only=True) for file in files]
    ranks = ranks if key is None else [rank[key] for rank in ranks]
    whole = {}
    for name, first in ranks[0].items():
        split = split_of(name) if len(ranks) > 1 else None
        whole[name] = first if split is None else merge([rank[name] for rank in ranks], split)
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_merges_what_the_engines_held(folder, kind):
    step = folder / kind / "checkpoints" / f"step_{STEPS:08d}"
    assert read_manifest(step).layout == Layout(dp=2, tp=2)
    assert inspect(step).facts["generator"].endswith("dp 2 x tp 2")
    converted = load_file(folder / kind / "converted" / "model.safetensors")
    for first in (0, 2):  # both data ranks
        files = [folder / kind / f"held{rank}.pt" for rank in (first, first + 1)]
        held, masters = merged(files, "weights"), merged(files, "masters")
        assert masters.keys() <= held.keys()
        for name, tensor in (held | masters).items():
            assert torch.equal(converted.pop(name.removeprefix("vqrae.")), tensor), name
        assert not converted
        converted = load_file(folder / kind / "converted" / "model.safetensors")
    initial = load_file(folder / "initial" / "model.safetensors")
    weight = "decoder.blocks.0.attention.qkv.weight"
    assert not torch.equal(converted[weight], initial[weight]), "training must have moved it"
    assert VQRAE.from_pretrained(folder / kind / "converted").config.num_embeddings == 63


def test_an_optimizer_in_the_hosts_memory_and_a_resident_encoder_change_nothing(folder):
    files = [[folder / kind / f"held{r}.pt" for r in (0, 1)] for kind in ("zero3", "zero3-offload")]
    there, here = (merged(pair, "masters") for pair in files)
    for name, tensor in there.items():
        assert torch.allclose(here[name], tensor, rtol=1e-5, atol=1e-6), name


def test_averages_are_merged_too(folder, tmp_path):
    step = folder / "zero3" / "checkpoints" / f"step_{STEPS:08d}"
    consolidate(step, tmp_path / "averages", to="inference", ema=True)
    averages = load_file(tmp_path / "averages" / "model.safetensors")
    initial = load_file(folder / "initial" / "model.safetensors")
    weights = load_file(folder / "zero3" / "converted" / "model.safetensors")
    for name in ("decoder.blocks.0.mlp.fc2.weight", "decoder.blocks.1.attention.qkv.weight"):
        between = (averages[name] - initial[name]).norm() / (weights[name] - initial[name]).norm()
        assert 0.2 < between < 0.8, f"{name}: an average of two steps is between start and end"


@pytest.mark.parametrize("tensor_size", [1, 4])
@pytest.mark.parametrize("label", ["converted", "from_run"])
@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_another_tensor_size_starts_with_the_same_weights(folder, kind, label, tensor_size):
    converted = load_file(folder / kind / "converted" / "model.safetensors")
    files = [folder / kind / f"{label}-{tensor_size}-{rank}.pt" for rank in range(tensor_size)]
    held = merged(files)
    for name, tensor in converted.items():
        assert torch.equal(held[f"vqrae.{name}"], tensor), name


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_drawn_weights_are_those_of_one_process(folder, tensor_size):
    alone = torch.load(folder / "drawn-1-0.pt", weights_only=True)
    held = merged([folder / f"drawn-{tensor_size}-{rank}.pt" for rank in range(tensor_size)])
    assert_equal(held, alone)
    assert alone["vqrae.decoder.blocks.0.attention.qkv.weight"].std() > 0
