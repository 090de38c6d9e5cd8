"""Frozen weights on real ranks: the pretrained ones once a run, the others in every checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import gathered, run_ranks
from tests.limits import small_files_only
from tests.memory import sampled_memory
from tests.tiny import ENCODER, images_of, make_rank_folders, make_run
from tests.zero_files import seal
from vqrae_ds import checkpoint, manifest
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint

pytestmark = pytest.mark.slow

CODEBOOK = "vqrae.quantizer.embedding.weight"
PREFIXES = {1: "vqrae.encoder.", 2: "teacher."}
OTHER = {"sharded": "resident", "resident": "sharded"}


class Case(NamedTuple):
    """A way in which the engine keeps the frozen weights."""

    stage: int
    zero: int
    bf16: bool
    where: str
    persistent: int = 0  # parameters up to that size stay whole under ZeRO-3

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


CASES = {
    "stage1-zero1-fp32-sharded": Case(1, 1, False, "sharded"),
    "stage1-zero1-bf16-sharded": Case(1, 1, True, "sharded"),
    "stage1-zero2-bf16-resident": Case(1, 2, True, "resident"),
    "stage1-zero3-fp32-sharded": Case(1, 3, False, "sharded"),
    "stage1-zero3-bf16-resident": Case(1, 3, True, "resident"),
    "stage1-zero3-fp32-persistent": Case(1, 3, False, "sharded", persistent=100_000),
    "stage2-zero1-fp32-resident": Case(2, 1, False, "resident"),
    "stage2-zero2-fp32-sharded": Case(2, 2, False, "sharded"),
    "stage2-zero3-bf16-sharded": Case(2, 3, True, "sharded"),
}


def run_of(folder: Path, rank: int, name: str, **changes: Any) -> Run:
    case = CASES[name]
    zero = {"stage": case.zero}
    if case.zero == 3:
        zero["stage3_param_persistence_threshold"] = case.persistent
    ranks = torch.distributed.get_world_size()
    deepspeed = {"train_batch_size": 2 * ranks, "zero_optimization": zero}
    if case.bf16:
        deepspeed["bf16"] = {"enabled": True}
    sections = {"run": {"output_dir": str(folder / name)}, "memory": {"frozen_encoder": case.where}}
    return make_run(
        folder / f"rank{rank}",
        case.stage,
        deepspeed=deepspeed,
        world_size=ranks,
        **{"losses": {"adversarial": None} if case.stage == 1 else None, **sections, **changes},
    )


def take_step(engine: Any, rank: int, step: int) -> float:
    output, teacher_BND = engine(images_of(step, rank))
    loss = output.patches_BhwP.float().square().mean() + output.vq_loss
    target_BND = 0.0 if teacher_BND is None else teacher_BND.float()
    loss = loss + (output.features_BND.float() - target_BND).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def held_frozen(engine: Any) -> dict[str, torch.Tensor]:
    """Gathered by DeepSpeed, and what is outside the module's tree."""
    from vqrae_ds.sharding import resident

    held = {n: t.clone() for n, t in resident.state(engine.module).items()}
    with gathered(engine.module):
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                held[name] = parameter.detach().clone()
    return held


def masters_of(engine: Any) -> list[torch.Tensor]:
    from vqrae_ds.sharding.partitions import masters

    return [master.clone() for master in masters(engine)]


def check_case(rank: int, folder: Path, name: str) -> None:
    from vqrae_ds import engines
    from vqrae_ds.sharding import resident

    case, run = CASES[name], run_of(folder, rank, name)
    engine = engines.build_generator(run)
    record = checkpoint.write_pretrained(run, engine)
    take_step(engine, rank, 0)
    first = checkpoint.save(run, checkpoint.Content(engine, None, TrainState(1), pretrained=record))
    path = manifest.frozen_file(folder / name, record)
    before = path.stat()
    take_step(engine, rank, 1)
    saved = checkpoint.save(run, checkpoint.Content(engine, None, TrainState(2), pretrained=record))
    assert checkpoint.find(run) == saved
    frozen = held_frozen(engine)
    losses = [take_step(engine, rank, step) for step in (2, 3)]
    check_files(rank, folder / name, case, [first, saved], frozen)

    for where in (case.where, OTHER[case.where]):
        resumed_run = run_of(folder, rank, name, memory={"frozen_encoder": where})
        assert checkpoint.find(resumed_run) == saved, "where it lies may change"
        resumed = engines.build_generator(resumed_run, fill=False)
        assert checkpoint.resume(saved, resumed, None).pretrained == record
        resident.check_filled(resumed.module)
        again = held_frozen(resumed)
        assert again.keys() == frozen.keys()
        for tensor in frozen:
            assert again[tensor].dtype == frozen[tensor].dtype == case.dtype
            assert torch.equal(again[tensor], frozen[tensor]), tensor
        now = [take_step(resumed, rank, step) for step in (2, 3)]
        if where == case.where:
            assert now == losses
            for mine, other in zip(masters_of(resumed), masters_of(engine), strict=True):
                # With three ranks the last ones have padding, which nobody gave a value.
                given = ~other.isnan()
                assert not mine[~given].any(), "padding is loaded as 0"
                assert torch.equal(mine[given], other[given])
        assert now == pytest.approx(losses, rel=1e-2 if case.bf16 else 1e-6)
    fresh = engines.build_generator(run)
    assert checkpoint.write_pretrained(run, fresh) == record
    assert checkpoint.write_pretrained(resumed_run, resumed) == record, "sharded and resident"
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    if rank == 0:
        engine_bytes = {n: t.nbytes for n, t in frozen.items()}
        torch.save(engine_bytes, folder / f"{name}.pt")
    engine.save_checkpoint(str(folder / "plain"), tag=name, save_latest=False)


def check_files(
    rank: int, home: Path, case: Case, folders: list[Path], frozen: dict[str, torch.Tensor]
) -> None:
    """What lies where, against the engine and the weights that it began with."""
    (path,) = (home / "frozen").iterdir()
    prefix = PREFIXES[case.stage]
    initial = load_file(home.parent / f"rank{rank}" / "initial" / "model.safetensors")
    encoder = {n.removeprefix("encoder."): t for n, t in initial.items() if n[:8] == "encoder."}
    shared = load_file(path)
    assert shared.keys() == {f"{prefix}{name}" for name in encoder}
    for name, tensor in encoder.items():
        assert torch.equal(shared[f"{prefix}{name}"], tensor.to(case.dtype)), name
    assert frozen.keys() == {*shared, CODEBOOK}
    for folder in folders:
        own = load_file(folder / "generator" / "frozen.safetensors")
        assert own.keys() == {CODEBOOK} and torch.equal(own[CODEBOOK], frozen[CODEBOOK])
        for file in (folder / "generator").glob("*_model_states.pt"):
            state = torch.load(file, weights_only=False)
            assert not frozen.keys() & state["module"].keys()
            assert state["frozen_param_fragments"] is None
        reader = ZeroCheckpoint(folder / "generator")
        assert {n for n, info in reader.tensors.items() if info.kind == "frozen"} == frozen.keys()
        for name, tensor in frozen.items():
            assert torch.equal(reader.read(name), tensor), name
        buffers = {n for n, info in reader.tensors.items() if info.kind == "buffer"}
        assert buffers >= {"vqrae.standardize.mean", "vqrae.standardize.std"}


def check_cases(rank: int, folder: Path, names: list[str]) -> None:
    for name in names:
        check_case(rank, folder, name)


def fail_on_rank_0(rank: int, folder: Path) -> None:
    """Rank 0 cannot write, cannot find, or finds damage: all ranks hear of it, and go on."""
    from vqrae_ds import engines

    for name in ("stage1-zero3-fp32-sharded", "stage1-zero1-fp32-sharded"):
        run = run_of(folder, rank, name, run={"output_dir": str(folder / f"{name}-full")})
        engine = engines.build_generator(run)
        with small_files_only(1000 if rank == 0 else 1 << 30):
            with pytest.raises(OSError, match="File too large"):
                checkpoint.write_pretrained(run, engine)
        left = folder / f"{name}-full" / "frozen"
        assert list(left.iterdir()) == []
        take_step(engine, rank, 0)
        saved = checkpoint.save(run, checkpoint.Content(engine, None, TrainState(1)))
        (path,) = left.iterdir()

        damaged = engines.build_generator(run, fill=False)
        own = saved / "generator" / "frozen.safetensors"
        torch.distributed.barrier()
        if rank == 0:
            own.rename(left / "away")
        torch.distributed.barrier()
        with pytest.raises(ValueError, match=f"does not fit .* {CODEBOOK} is missing"):
            checkpoint.resume(saved, damaged, None)
        torch.distributed.barrier()
        if rank == 0:
            (left / "away").rename(own)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 16
            path.write_bytes(content)
        torch.distributed.barrier()
        with pytest.raises(ValueError, match=f"{path} does not match its checksum"):
            checkpoint.find(run)


def leave_one_of_them_out(rank: int, folder: Path) -> None:
    """Without a teacher nothing pretrained is frozen; codes of moving averages are buffers."""
    from vqrae_ds import engines

    untrained = {"model": None, "allow_untrained_encoder": True}
    variants = {
        "stage2-zero3-bf16-sharded": {"losses": {"distillation": None}},
        "stage1-zero3-fp32-sharded": {"model": {"use_simvq": False}, "init": untrained},
    }
    for name, changes in variants.items():
        home, has_encoder = folder / f"{name}-less", "model" in changes
        run = run_of(folder, rank, name, run={"output_dir": str(home)}, **changes)
        engine = engines.build_generator(run)
        record = checkpoint.write_pretrained(run, engine)
        saved = checkpoint.save(
            run, checkpoint.Content(engine, None, TrainState(1), pretrained=record)
        )
        assert manifest.read_manifest(saved).frozen == record
        assert (record is not None) == (home / "frozen").exists() == has_encoder
        own = [path.name for path in saved.rglob("*.safetensors")]
        assert own == ([] if has_encoder else ["frozen.safetensors"])
        resumed = engines.build_generator(run, fill=False)
        assert checkpoint.resume(saved, resumed, None).pretrained == record
        frozen = held_frozen(engine)
        assert frozen
        for tensor, value in held_frozen(resumed).items():
            assert torch.equal(value, frozen[tensor]), tensor


def resume_from_fragments(rank: int, folder: Path) -> None:
    """A checkpoint of the first format: DeepSpeed's files hold the frozen parameters too."""
    from vqrae_ds import engines

    for name in ("stage1-zero3-fp32-sharded", "stage1-zero1-bf16-sharded"):
        run = run_of(folder, rank, name)
        engine = engines.build_generator(run)
        saved = checkpoint.save(run, checkpoint.Content(engine, None, TrainState(1)))
        old = folder / f"{name}-old" / "checkpoints" / saved.name
        if rank == 0:
            shutil.copytree(saved, old, ignore=shutil.ignore_patterns("generator"))
        torch.distributed.barrier()
        engine.save_checkpoint(str(old), tag="generator", save_latest=False)
        if rank == 0:
            seal(old, step=1, world_size=2)
            payload = manifest.read_sealed(old / "manifest.json") | {"format_version": 1}
            del payload["frozen"]
            (old / "manifest.json").write_text(json.dumps(payload))
        torch.distributed.barrier()
        moved = run_of(folder, rank, name, run={"output_dir": str(folder / f"{name}-old")})
        assert checkpoint.find(moved) == old
        resumed = engines.build_generator(moved, fill=False)
        assert checkpoint.resume(old, resumed, None).pretrained is None
        frozen = held_frozen(engine)
        for tensor, value in held_frozen(resumed).items():
            assert torch.equal(value, frozen[tensor]), tensor
        checkpoint.save(moved, checkpoint.Content(resumed, None, TrainState(2)))
        names = [[path.name for path in home.iterdir()] for home in homes_of(folder, name)]
        assert names[0] == names[1], "from now on it is as in any run"


def homes_of(folder: Path, name: str) -> list[Path]:
    return [folder / run / "frozen" for run in (name, f"{name}-old")]


def write_a_wide_encoder(rank: int, folder: Path) -> None:
    """The most memory that each rank takes to write it goes to a file, and its size."""
    from vqrae_ds import engines

    wide = folder / f"wide{rank}"
    wide.mkdir()
    shape = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 8}
    shape["intermediate_size"] = 3072
    (wide / "config.json").write_text(json.dumps(ENCODER | shape))
    run = run_of(
        folder,
        rank,
        "stage1-zero3-fp32-sharded",
        model={"encoder_config_path": str(wide)},
        init={"model": None, "allow_untrained_encoder": True},
    )
    engine = engines.build_generator(run)
    peaks: dict[str, int] = {}
    with sampled_memory(peaks):
        record = checkpoint.write_pretrained(run, engine)
    (folder / f"written{rank}.json").write_text(json.dumps([record.size, peaks["RssAnon"]]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    make_rank_folders(folder, 2)
    run_ranks(2, check_cases, folder, list(CASES), timeout_seconds=500)
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_smaller_by_the_pretrained_weights(folder, name):
    sizes = torch.load(folder / f"{name}.pt")
    pretrained = sum(size for n, size in sizes.items() if n != CODEBOOK)
    saved = folder / name / "checkpoints" / "step_00000002"
    ours, plain = size_of(saved / "generator"), size_of(folder / "plain" / name)
    header = 1000  # of the codebook's file
    if CASES[name].where == "sharded":
        assert ours < plain - pretrained + header
    assert ours < plain + sizes[CODEBOOK] + header


@pytest.mark.parametrize("name", CASES)
def test_it_converts_and_needs_the_file_of_the_run(folder, name, tmp_path):
    saved = folder / name / "checkpoints" / "step_00000002"
    consolidate(saved, tmp_path / "out", to="stage2")
    verify(saved, tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    initial = load_file(folder / "rank0" / "initial" / "model.safetensors")
    assert converted.keys() == initial.keys()
    kept = {CODEBOOK.removeprefix("vqrae.")}
    if CASES[name].stage == 1:
        kept |= {n for n in initial if n.startswith("encoder.")}
    for tensor in kept:
        assert torch.equal(converted[tensor], initial[tensor].to(CASES[name].dtype)), tensor
    moved = [n for n, t in initial.items() if not torch.equal(converted[n].float(), t)]
    assert set(moved) - kept, "training must have changed something"
    (path,) = (folder / name / "frozen").iterdir()
    path.rename(tmp_path / "away")
    try:
        with pytest.raises(ValueError, match=f"{path} is missing: the folder frozen/ of a run"):
            consolidate(saved, tmp_path / "again", to="stage2")
        with pytest.raises(ValueError, match=f"{path} is missing: the folder frozen/ of a run"):
            ZeroCheckpoint(saved / "generator")
    finally:
        (tmp_path / "away").rename(path)


def test_what_fails_on_rank_0_fails_on_all(tmp_path):
    make_rank_folders(tmp_path, 2)
    run_ranks(2, fail_on_rank_0, tmp_path)


def test_uneven_shares(tmp_path):
    make_rank_folders(tmp_path, 3)
    run_ranks(3, check_cases, tmp_path, ["stage1-zero3-fp32-sharded"])


def test_one_of_the_two_files_alone(tmp_path):
    make_rank_folders(tmp_path, 2)
    run_ranks(2, leave_one_of_them_out, tmp_path)


def test_fragments_of_deepspeed_are_read_still(tmp_path):
    make_rank_folders(tmp_path, 2)
    run_ranks(2, resume_from_fragments, tmp_path)


def test_no_rank_holds_the_whole_encoder_to_write_it(tmp_path):
    make_rank_folders(tmp_path, 2)
    run_ranks(2, write_a_wide_encoder, tmp_path)
    for rank in range(2):
        size, peak = json.loads((tmp_path / f"written{rank}.json").read_text())
        print(f"rank {rank}: {peak / 1e6:.1f} MB to write {size / 1e6:.1f} MB")
        assert size > 200e6
        assert peak < 0.2 * size
