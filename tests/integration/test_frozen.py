"""Frozen weights on real ranks: the pretrained ones once a run, the others in every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.frozen_runs import CASES, CODEBOOK, Case, held_frozen, run_of, take_step
from tests.tiny import make_rank_folders
from vqrae_ds import checkpoint, manifest
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint

pytestmark = pytest.mark.slow

PREFIXES = {1: "vqrae.encoder.", 2: "teacher."}
OTHER = {"sharded": "resident", "resident": "sharded"}


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


def test_uneven_shares(tmp_path):
    make_rank_folders(tmp_path, 3)
    run_ranks(3, check_cases, tmp_path, ["stage1-zero3-fp32-sharded"])
