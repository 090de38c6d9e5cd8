"""Conversion of checkpoints that real DeepSpeed engines wrote, against the weights they hold."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tests.distributed import run_ranks
from tests.zero_files import seal
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.inspection import inspect
from vqrae_ds.conversion.rank_checks import check_step_of_manifest, optimizer_steps
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint

pytestmark = pytest.mark.slow

PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
GENERATORS = ["stage1_fp32", "stage1_bf16", "stage2_fp32", "stage2_bf16"]
# Layouts of ZeRO-1 and 2 beside the plain ones, which the discriminators of stage 2 have.
DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "zero1_summed_in_fp32": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero1_aligned": {"zero_optimization": {"stage": 1, "parameter_alignment": True}},
    "zero2": {"zero_optimization": {"stage": 2}},
}


class Tokenizer(nn.Module):
    """No size divides by 2 or 3 ranks, and the smallest parameter has fewer elements than ranks."""

    def __init__(self, freeze_encoder: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(7, 5).requires_grad_(not freeze_encoder)
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("num_images", torch.tensor(3))
        self.register_buffer("not_saved", torch.ones(2), persistent=False)
        self.projection = nn.Linear(5, 3)
        self.simvq = nn.ModuleDict({"embedding": nn.Embedding(11, 3)}).requires_grad_(False)
        self.decoder = nn.Sequential(nn.Linear(3, 13), nn.GELU(), nn.Linear(13, 7, bias=False))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        z_BE = self.projection(self.encoder(x_BD) - self.mean.to(x_BD))
        codes_BE = self.simvq["embedding"](torch.arange(len(x_BD)))
        return self.decoder(z_BE + codes_BE) * self.scale


class Generator(nn.Module):
    def __init__(self, stage: int) -> None:
        super().__init__()
        self.vqrae = Tokenizer(freeze_encoder=stage == 1)
        if stage == 2:
            self.teacher = nn.Linear(7, 5).requires_grad_(False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        loss = F.mse_loss(self.vqrae(x_BD), x_BD)
        if hasattr(self, "teacher"):
            loss = loss + F.mse_loss(self.vqrae.encoder(x_BD), self.teacher(x_BD))
        return loss


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 5).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(5, 11), nn.GroupNorm(1, 11), nn.Linear(11, 1))
        self.tied = self.body[0].bias
        self.register_buffer("running_mean", torch.randn(5))
        self.register_buffer("num_batches", torch.tensor(9))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(x_BD) - self.running_mean.to(x_BD)).square().mean()


def make_engine(module: nn.Module, rank: int, config: dict[str, Any]) -> Any:
    """An engine with two parameter groups that has made two steps."""
    import deepspeed

    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": trainable[::2]}, {"params": trainable[1::2], "lr": 0.003}]
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": adamw, **config}
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        x_BD = torch.randn(4, 7, generator=generator)
        engine.backward(engine(x_BD.bfloat16() if "bf16" in config else x_BD))
        engine.step()
    return engine


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """What the engine holds: fp32 masters, frozen parameters, persistent buffers."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    held = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            held[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters(parameter):
                held[name] = parameter.detach().clone()
    saved = engine.module.state_dict().keys()
    held |= {n: b.clone() for n, b in engine.module.named_buffers() if n in saved}
    return held


def save(engine: Any, rank: int, folder: Path, tag: str) -> None:
    """Save as the trainer does; and beside it what the engine holds and DeepSpeed's tool reads."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    held = gather(engine)
    if rank == 0:
        torch.save(held, folder / f"{tag}_held.pt")
        if tag != "zero1_summed_in_fp32":  # its tool refuses what its BF16_Optimizer writes
            converted = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
            torch.save(dict(converted), folder / f"{tag}_zero_to_fp32.pt")


def write_checkpoints(rank: int, folder: Path) -> None:
    zero3 = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "sub_group_size": 20,  # several sub-groups in each parameter group
    }
    for case in GENERATORS:
        torch.manual_seed(0)
        stage, precision = int(case[5]), PRECISIONS[case[7:]]
        engine = make_engine(Generator(stage), rank, {"zero_optimization": zero3, **precision})
        save(engine, rank, folder / case, "generator")
        if stage == 2:
            config = {"zero_optimization": {"stage": 1}, **precision}
            save(make_engine(Discriminator(), rank, config), rank, folder / case, "discriminator")
    for case, config in DISCRIMINATORS.items():
        torch.manual_seed(0)
        save(make_engine(Discriminator(), rank, config), rank, folder / "engines", case)
        save_after_a_skipped_step(rank, folder, case, config)
    save_after_a_skipped_step(rank, folder, "zero3", {"zero_optimization": zero3})


def save_after_a_skipped_step(rank: int, folder: Path, name: str, config: dict[str, Any]) -> None:
    """A loss that is not finite on one rank skips the third step on all; the fourth is taken."""
    engine = make_engine(Discriminator(), rank, config)
    for factor in (float("nan") if rank == 1 else 1.0, 1.0):
        x_BD = torch.ones(4, 7, dtype=torch.bfloat16 if "bf16" in config else torch.float32)
        engine.backward(engine(x_BD) * factor)
        engine.step()
    assert (engine.global_steps, engine.skipped_steps) == (4, 1)
    engine.save_checkpoint(str(folder / "skipped"), tag=name, save_latest=False)


@pytest.fixture(scope="module", params=[2, 3], ids=["2_ranks", "3_ranks"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(request.param, write_checkpoints, folder)
    for case in GENERATORS:
        (folder / case / "model_config.json").write_text("{}")
        seal(folder / case, step=2, world_size=request.param)
    return folder


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    assert torch.equal(found, wanted), name


@pytest.mark.parametrize(
    "engine",
    [f"{case}/generator" for case in GENERATORS]
    + ["stage2_fp32/discriminator", "stage2_bf16/discriminator"]
    + [f"engines/{case}" for case in DISCRIMINATORS],
)
def test_reads_what_the_engine_holds_and_what_deepspeed_reads(folder, engine):
    held = torch.load(folder / f"{engine}_held.pt")
    peer_file = folder / f"{engine}_zero_to_fp32.pt"
    peer = torch.load(peer_file) if peer_file.exists() else held
    checkpoint = ZeroCheckpoint(folder / engine)
    assert (checkpoint.step, checkpoint.deepspeed_version) == (2, version("deepspeed"))
    assert all(optimizer_steps(file) == {2.0} for file in checkpoint.files.optimizers)
    assert checkpoint.tensors.keys() == held.keys()
    for name, info in checkpoint.tensors.items():
        found = checkpoint.read(name)
        assert (info.shape, info.dtype) == (found.shape, found.dtype)
        assert_same_bits(found, held[name], name)
        if name in peer:  # under ZeRO-1 it leaves the frozen parameters out
            assert_same_bits(found, peer[name], name)
        kind = {"mean": "buffer", "num": "buffer", "stem": "frozen", "simvq": "frozen"}
        wanted = next((k for part, k in kind.items() if part in name), None)
        assert wanted in (None, info.kind), name
    trained = [n for n, info in checkpoint.tensors.items() if info.kind == "trainable"]
    assert len(trained) >= 5 and set(trained) <= peer.keys()
    if "bf16" in engine:
        masters = torch.cat([checkpoint.read(name).reshape(-1) for name in trained])
        assert not torch.equal(masters, masters.bfloat16().float()), "these are not the masters"


@pytest.mark.parametrize("case", DISCRIMINATORS)
def test_the_inspection_knows_the_layout_of_every_optimizer(folder, case):
    found = inspect(folder / "engines" / case, verify=True)
    ranks = ZeroCheckpoint(folder / "engines" / case).num_ranks
    assert found.facts["engine"] == f"ZeRO-{case[4]}, dp {ranks} x tp 1"
    assert found.damage == []


@pytest.mark.parametrize("case", GENERATORS)
def test_converts_for_stage_2_without_loss(folder, case, tmp_path):
    consolidate(folder / case, tmp_path / "out", to="stage2", max_shard_bytes=200)
    verify(folder / case, tmp_path / "out")
    held = torch.load(folder / case / "generator_held.pt")
    found = {}
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        found |= load_file(path)
    assert {f"vqrae.{n}" for n in found} == {n for n in held if n.startswith("vqrae.")}
    for name, tensor in found.items():
        assert_same_bits(tensor, held[f"vqrae.{name}"], name)
    discriminator = tmp_path / "out" / "discriminator.safetensors"
    assert discriminator.exists() == case.startswith("stage2")
    if discriminator.exists():
        held, found = torch.load(folder / case / "discriminator_held.pt"), load_file(discriminator)
        assert held.keys() == found.keys()
        for name, tensor in found.items():
            assert_same_bits(tensor, held[name], name)


@pytest.mark.parametrize("case", ["stage1_bf16", "stage2_fp32"])
def test_converts_for_inference_in_bf16(folder, case, tmp_path):
    consolidate(folder / case, tmp_path / "out", to="inference", dtype=torch.bfloat16)
    verify(folder / case, tmp_path / "out")
    held = torch.load(folder / case / "generator_held.pt")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"vqrae.{n}" for n in found} == {n for n in held if n.startswith("vqrae.")}
    for name, tensor in found.items():
        wanted = held[f"vqrae.{name}"]
        is_buffer = name in ("mean", "num_images")
        assert_same_bits(tensor, wanted if is_buffer else wanted.bfloat16(), name)
    assert not (tmp_path / "out" / "discriminator.safetensors").exists()


@pytest.mark.parametrize("case", [*DISCRIMINATORS, "zero3"])
def test_a_skipped_step_counts_for_the_engine_and_not_for_its_optimizer(folder, case):
    checkpoint = ZeroCheckpoint(folder / "skipped" / case)
    assert checkpoint.step == 4
    assert all(optimizer_steps(file) == {3.0} for file in checkpoint.files.optimizers)
    check_step_of_manifest(checkpoint.files, 4)
    check_step_of_manifest(checkpoint.files, 9, began_later=True)
    for step, began_later in ((3, False), (5, False), (3, True)):
        with pytest.raises(ValueError, match=f"is of step 4, the manifest is of step {step}"):
            check_step_of_manifest(checkpoint.files, step, began_later=began_later)
