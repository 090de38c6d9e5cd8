"""Whole runs through the real launcher, small: configuration files, command line, environment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from tests.conftest import ROOT
from tests.tiny import DEEPSPEED, ENCODER, GAN, MODEL, build_model
from vqrae_ds.data.shard_writing import find_images, write_shards

STEPS, SAVE_EVERY = 24, 8
ADAMW = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.1},
    },
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(folder: Path, stage: int, *overrides: str, ranks: int = 2) -> list[str]:
    port = free_port()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [
        *launcher,
        *("--master_addr", "127.0.0.1", "--master_port", str(port), "--module", "vqrae_ds.train"),
        *("--config", str(folder / f"stage{stage}.yaml")),
        *("--deepspeed_config", str(folder / "deepspeed.json")),
        *overrides,
    ]


def environment() -> dict[str, str]:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": search, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def finish(
    folder: Path, stage: int, *overrides: str, ranks: int = 2, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """A run that ends by itself, however it ends."""
    return subprocess.run(
        command(folder, stage, *overrides, ranks=ranks),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def train(folder: Path, stage: int, *overrides: str, ranks: int = 2, seconds: float = 240) -> str:
    """What a run says that must succeed."""
    done = finish(folder, stage, *overrides, ranks=ranks, seconds=seconds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@contextlib.contextmanager
def started(
    folder: Path, stage: int, *overrides: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A run's launcher, in a process group of its own; nothing of that is left at the end."""
    with open(log, "w") as file:
        launcher = subprocess.Popen(
            command(folder, stage, *overrides),
            env=environment(),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield launcher
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen, log: Path) -> None:
    """Wait until the run has logged the step, which it must do before it ends."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "the run never got to the step"
        time.sleep(0.01)


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The trainer's processes below the launcher, the loaders of their data left out."""
    with_rank = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it has just ended
            if "RANK" in process.environ() and "vqrae_ds.train" in process.cmdline():
                with_rank[process] = process.ppid()
    pids = {process.pid for process in with_rank}
    return [process for process, parent in with_rank.items() if parent not in pids]


def make_inputs(folder: Path) -> None:
    """A pretrained encoder, and the photographs as shards."""
    build_model().encoder.model.save_pretrained(folder / "encoder")
    (folder / "encoder" / "config.json").write_text(json.dumps(ENCODER))
    for split in ("train", "val"):
        photographs = find_images(ROOT / "tests/data/photos" / split)
        write_shards(
            photographs, folder / split, samples_per_shard=10, root=ROOT / "tests/data/photos"
        )


def write_configs(folder: Path, lpips: Path) -> None:
    losses = {"perceptual": {"weight": 0.1, "every_steps": 2, "weights": str(lpips)}}
    gan = {"weight": 0.1, "discriminator_start_step": 9, "start_step": 10, **GAN}
    base = {
        "model": {**MODEL, "encoder_config_path": str(folder / "encoder")},
        "data": {
            "train": str(folder / "train"),
            "validation": str(folder / "val"),
            "num_workers": 1,
        },
        "checkpoint": {"every_steps": SAVE_EVERY},
        "monitor": {"log_every_steps": 1, "validate_every_steps": 1000},
    }
    stage1 = base | {
        "stage": 1,
        "run": {
            "output_dir": str(folder / "stage1"),
            "total_steps": STEPS,
            "calibration_images": 64,
        },
        "init": {"encoder_weights": str(folder / "encoder")},
        "losses": losses | {"adversarial": gan},
    }
    stage2 = base | {
        "stage": 2,
        "run": {"output_dir": str(folder / "stage2"), "total_steps": SAVE_EVERY},
        "init": {"model": str(folder / "stage1_weights")},
        "losses": losses,
    }
    (folder / "stage1.yaml").write_text(yaml.safe_dump(stage1))
    (folder / "stage2.yaml").write_text(yaml.safe_dump(stage2))
    (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED | ADAMW))
