"""The main job in small: stage 1, stage 2, a kill, a resume, both conversions; real launcher.

Both stages have GAN, averages, and two micro batches a step. Kills in stage 1: test_kill_drill.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.launching import (
    SAVE_EVERY,
    STEPS,
    command,
    environment,
    make_inputs,
    started,
    train,
    wait_for_step,
    write_configs,
)
from tests.tiny import images_of
from vqrae_ds import VQRAE
from vqrae_ds.config import read_run
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.evaluation.summary import read_metrics
from vqrae_ds.manifest import (
    complete_steps,
    find_step_folder,
    find_step_folders,
    read_manifest,
)

pytestmark = pytest.mark.slow

GAN_AFTER = 10
KILL_AFTER, RESUMED_AT = 17, 16


class Chain(NamedTuple):
    """Folders of the finished chain, and its stage 2 run over again without the kill."""

    folder: Path
    stage1: Path
    stage1_weights: Path
    straight: Path
    stage2: Path
    inference: Path


def turn_everything_on(folder: Path) -> None:
    """In the files of both stages."""
    configs = {path: yaml.safe_load(path.read_text()) for path in folder.glob("stage?.yaml")}
    gan = configs[folder / "stage1.yaml"]["losses"]["adversarial"]
    for path, config in configs.items():
        config["ema"] = {"decay": 0.9}
        config["losses"]["adversarial"] = gan
        config["run"]["total_steps"] = STEPS
        path.write_text(yaml.safe_dump(config))
    path = folder / "deepspeed.json"
    deepspeed = json.loads(path.read_text()) | {"train_micro_batch_size_per_gpu": 1}
    path.write_text(json.dumps(deepspeed))


def train_until_killed(folder: Path, stage: int, run_folder: Path) -> None:
    """Start the run and kill -9 launcher and ranks together once it has logged step KILL_AFTER."""
    log = run_folder.with_suffix(".log")
    with started(folder, stage, log=log) as launcher:
        wait_for_step(run_folder, KILL_AFTER, launcher, log)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, lpips_weights) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    make_inputs(folder)
    write_configs(folder, lpips_weights)
    turn_everything_on(folder)

    train(folder, 1)
    consolidate(find_step_folder(folder / "stage1"), folder / "stage1_weights", to="stage2")
    train(folder, 2, f"run.output_dir={folder / 'straight'}")
    train_until_killed(folder, 2, folder / "stage2")
    resumed = train(folder, 2)
    checkpoint = folder / "stage2" / "checkpoints" / f"step_{RESUMED_AT:08d}"
    assert f"resumed from {checkpoint}" in resumed
    consolidate(find_step_folder(folder / "stage2"), folder / "inference", to="inference")
    names = ("stage1", "stage1_weights", "straight", "stage2", "inference")
    return Chain(folder, *(folder / name for name in names))


@pytest.mark.parametrize("kind", ["generator", "discriminator", "averages"])
def test_killed_and_resumed_equals_uninterrupted(chain, kind):
    averages = kind == "averages"
    engine = "generator" if averages else kind
    ours, theirs = (
        ZeroCheckpoint(find_step_folder(run) / engine, averages=averages)
        for run in (chain.stage2, chain.straight)
    )
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in theirs.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name


def test_metrics_of_the_resumed_run_hold_each_step_once(chain):
    ours, theirs = (
        [e for e in read_metrics(run) if "loss/total" in e]
        for run in (chain.stage2, chain.straight)
    )
    assert [e["step"] for e in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        same = {k for k in other if not k.startswith("perf/") and k[:9] != "codebook/"}
        assert {k: mine[k] for k in same} == {k: other[k] for k in same}


def test_a_logged_learning_rate_is_the_one_its_step_took(chain):
    rates = [e["optim/learning_rate_decoder"] for e in read_metrics(chain.straight)[:6]]
    assert rates[:4] == pytest.approx([0.0, 0.25e-3, 0.5e-3, 0.75e-3])
    assert 0.95e-3 < rates[5] < rates[4] < 1e-3, "the cosine begins"


def test_frozen_encoder_is_bytewise_what_it_was(chain):
    before = load_file(chain.folder / "encoder" / "model.safetensors")
    after = load_file(chain.stage1_weights / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(after[f"encoder.model.{name}"], value), name
    trained = load_file(chain.inference / "model.safetensors")
    moved = [n for n, v in before.items() if not torch.equal(trained[f"encoder.model.{n}"], v)]
    assert moved, "stage 2 trains the encoder"


def test_the_frozen_weights_are_written_once_before_the_first_step(chain):
    parts = {chain.straight: "teacher.", chain.stage2: "teacher."}
    parts[chain.stage1] = "vqrae.encoder."
    written = {}
    for run, prefix in parts.items():
        (path,) = (run / "frozen").iterdir()
        written[run] = path.name
        assert all(name.startswith(prefix) for name in load_file(path))
        assert all(
            read_manifest(s).frozen.xxh3_128 == path.stem
            for s in complete_steps(run / "checkpoints")
        )
        # The last start of the run, just before its steps, writes config.yaml.
        assert path.stat().st_mtime_ns <= (run / "config.yaml").stat().st_mtime_ns
    assert written[chain.straight] == written[chain.stage2], "the same weights, the same name"


def reconstruct_with_engines(rank: int, chain: Chain) -> None:
    """A fixed batch through live engines: stage 1's last, stage 2's first, stage 2's last."""
    from vqrae_ds import checkpoint, engines

    images = images_of(0, 0)
    for name, stage, resumes in (("end1", 1, True), ("start2", 2, False), ("end2", 2, True)):
        run = read_run(
            chain.folder / f"stage{stage}.yaml", chain.folder / "deepspeed.json", world_size=2
        )
        generator = engines.build_generator(run, fill=not resumes)
        if resumes:
            discriminator = engines.build_discriminator(run)
            checkpoint.resume(checkpoint.find(run), generator, discriminator)
        generator.eval()
        with torch.no_grad():
            reconstruction = generator(images).vqrae.reconstruction
        if rank == 0:
            torch.save(reconstruction, chain.folder / f"{name}.pt")


def test_live_engines_and_converted_folders_agree(chain):
    run_ranks(2, reconstruct_with_engines, chain)
    end1, start2, end2 = (
        torch.load(chain.folder / f"{name}.pt") for name in ("end1", "start2", "end2")
    )
    assert torch.equal(start2, end1), "stage 2 starts where stage 1 ended"
    assert not torch.equal(end2, end1)
    images = images_of(0, 0)
    with torch.no_grad():
        assert torch.equal(VQRAE.from_pretrained(chain.stage1_weights)(images).reconstruction, end1)
        model = VQRAE.from_pretrained(chain.inference)
        assert torch.equal(model(images).reconstruction, end2)
        assert torch.equal(model.decode_from_indices(model.encode_to_indices(images)), end2)


def test_run_folder_explains_itself(chain):
    for name in ("config.yaml", "deepspeed.json", "environment.json"):
        assert (chain.stage1 / name).is_file()
    environment = json.loads((chain.stage1 / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert list((chain.stage1 / "tensorboard").iterdir())
    assert list((chain.stage1 / "samples").glob("step_*.png"))
    again = read_run(chain.stage1 / "config.yaml", chain.folder / "deepspeed.json", world_size=2)
    assert again.schedule.total_steps == STEPS


def test_another_number_of_ranks_goes_on(chain, tmp_path):
    """One rank takes the steps that two ranks took, with all that the trainer does around them."""
    moved = tmp_path / "moved"
    shutil.copytree(chain.stage1, moved)
    first, *later = reversed(find_step_folders(moved))
    for folder in later:
        shutil.rmtree(folder)
    one_rank = command(
        chain.folder,
        1,
        f"run.output_dir={moved}",
        "deepspeed.train_micro_batch_size_per_gpu=4",
    )
    one_rank[one_rank.index("--num_gpus") + 1] = "1"
    done = subprocess.run(
        one_rank, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert f"resumed from {first} at step {SAVE_EVERY}: written by 2 ranks, now 1" in output
    ours, theirs = (
        {e["step"]: e["loss/total"] for e in read_metrics(run) if "loss/total" in e}
        for run in (moved, chain.stage1)
    )
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    # The adaptive weight of the GAN, which begins after step 10, is measured by micro batch.
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-5 if step <= GAN_AFTER else 0.05), step
