"""The files of frozen weights where they fail, are left out or old; the memory to write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.frozen_runs import CODEBOOK, held_frozen, run_of, take_step
from tests.limits import small_files_only
from tests.memory import sampled_memory
from tests.tiny import ENCODER, make_rank_folders
from tests.zero_files import seal
from vqrae_ds import checkpoint, manifest
from vqrae_ds.checkpoint import TrainState

pytestmark = pytest.mark.slow


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


def test_what_fails_on_rank_0_fails_on_all(tmp_path):
    make_rank_folders(tmp_path, 2)
    run_ranks(2, fail_on_rank_0, tmp_path)


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
