"""Small runs on a cluster: their files, their weights, how far they are, what is left of them."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cluster.cluster import CONTROLLER, MiniCluster, wait_until
from tests.conftest import ROOT
from tests.launching import environment, make_inputs, write_configs
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.manifest import find_step_folder

STEPS, SAVE_EVERY = 80, 20  # some seconds on a machine that does nothing else
START_SECONDS = 240  # from the launch to the first steps, on a machine that is busy
# Every character that a shell, ssh, pdsh or SLURM might make something else of.
ODD = "a  b 'c' \"d\" $(echo e) `f` \\g %h %% & ; #"

THREE_RANKS = ["deepspeed.train_batch_size=6"]
SETTINGS = [
    f"run.total_steps={STEPS}",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "data.validation=null",
    "data.num_workers=0",
    "losses.perceptual=null",
    "losses.adversarial=null",
]


def make_files(folder: Path) -> None:
    """The inputs and configurations of both stages, and hostfiles of two nodes."""
    make_inputs(folder)
    write_configs(folder, folder / "no_lpips")
    (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    (folder / "uneven_hosts").write_text("n1 slots=2\nn2 slots=1\n")


def files_of(folder: Path, stage: int) -> list[str]:
    """What a launch script takes before the overrides."""
    return [str(folder / f"stage{stage}.yaml"), str(folder / "deepspeed.json")]


def settings_of(run: Path) -> list[str]:
    """The overrides of a run; a folder with odd characters is quoted as YAML wants it."""
    return [*SETTINGS, f"run.output_dir={json.dumps(str(run))}"]


def site(**more: str) -> dict[str, str]:
    """The environment that a launch script is called in."""
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RANKS_PER_NODE": "1"}
    return {**environment(), **settings, **more}


def python_without_torch(folder: Path) -> Path:
    """An environment that can read configurations and no more, as one beside a container."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    wanted = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "yaml")
    for name in (*wanted, "xxhash", "braceexpand", "typing_extensions.py"):
        (packages / name).symlink_to(Path(sysconfig.get_path("purelib"), name))
    return folder / "bin" / "python"


def wait_for_step(run: Path, step: int, is_alive: Callable[[], bool]) -> None:
    """Wait until the run, whose launch is alive, has logged the step."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + START_SECONDS
    looked = time.monotonic()
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline, f"{START_SECONDS} s, and no step {step} of {run}"
        time.sleep(0.02)
        if time.monotonic() - looked > 2:
            assert is_alive(), f"{run} ended before step {step}"
            looked = time.monotonic()


def rank_of(cluster: MiniCluster, node: str, local_rank: int = 0) -> int:
    """The pid of a rank on a node, as soon as it is there."""
    pattern = f"vqrae_ds.train --local_rank={local_rank}"
    found = wait_until(
        f"a rank on {node}", START_SECONDS, lambda: cluster.processes(node, pattern), pause=0.05
    )
    (pid,) = found
    return pid


def left_on(cluster: MiniCluster) -> dict[int, str]:
    """What lives of any job: all nodes' processes are in sight of the controller."""
    return cluster.processes(CONTROLLER, "vqrae_ds.")


def send(cluster: MiniCluster, node: str, signal: str, pid: int) -> None:
    cluster.ask(node, "kill", f"-{signal}", str(pid))


def environment_of(cluster: MiniCluster, node: str, pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    words = cluster.ask(node, "cat", f"/proc/{pid}/environ").split("\0")
    return dict(word.split("=", maxsplit=1) for word in words if "=" in word)


def weights_of(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the last step of a run; `folder` is for their conversion."""
    checkpoint = find_step_folder(run)
    assert checkpoint.name == f"step_{STEPS:08d}"
    consolidate(checkpoint, folder, to="stage2")
    return load_file(folder / "model.safetensors")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def submit(
    cluster: MiniCluster, folder: Path, run: Path, *options: str, env: dict[str, str] | None = None
) -> str:
    """A job of stage 1; its log is beside the run's folder."""
    return cluster.submit(
        *("--gres=none", "--time=20", f"--output={folder}/{run.name}.log", *options),
        *("launchers/slurm.sbatch", *files_of(folder, 1)),
        *settings_of(run),
        env=site(**(env or {})),
    )


def log_of(folder: Path, run: Path) -> str:
    """The end of a run's log, for the message of a failure."""
    path = folder / f"{run.name}.log"
    return path.read_text(errors="replace")[-6000:] if path.is_file() else os.fspath(path)
