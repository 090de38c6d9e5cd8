"""Who a process of a tool is by its launcher, which device it has, and how it meets its peers."""

from __future__ import annotations

import pytest
import torch

from vqrae_ds.device import choose_device
from vqrae_ds.evaluation.joining import joined_ranks
from vqrae_ds.worker import Worker, this_worker

STEP = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}  # of srun


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What a launcher of the tests themselves may have left is taken away."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *STEP):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_who_a_process_is():
    assert this_worker({}) == Worker(0, 1, 0)
    said = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert this_worker(said | {"SLURM_PROCID": "0"}) == Worker(3, 8, 1)
    assert this_worker(STEP) == Worker(5, 6, 2)
    assert this_worker({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}) == Worker(), "a batch script"
    for wrong in (said | {"RANK": "8"}, said | {"WORLD_SIZE": "-1"}, said | {"RANK": "x"}):
        with pytest.raises(ValueError, match="RANK="):
            this_worker(wrong)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device {name}"):
        choose_device(name)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_each_rank_has_a_gpu_of_its_own(own_environment, launcher: str) -> None:
    """A machine of two GPUs, as torch would describe it."""
    current: list[torch.device] = []
    own_environment.setattr(torch.cuda, "is_available", lambda: True)
    own_environment.setattr(torch.cuda, "device_count", lambda: 2)
    own_environment.setattr(torch.cuda, "set_device", current.append)
    assert choose_device() == torch.device("cuda:0") == current.pop()
    words = {"RANK": "9", "WORLD_SIZE": "16"} if launcher == "torchrun" else STEP
    local = "LOCAL_RANK" if launcher == "torchrun" else "SLURM_LOCALID"
    for name, value in (words | {local: "1"}).items():
        own_environment.setenv(name, value)
    assert choose_device() == choose_device("cuda") == torch.device("cuda:1") == current.pop()
    assert choose_device("cuda:0") == torch.device("cuda:0") == current.pop()
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:2: torch sees 2"):
        choose_device("cuda:2")
    own_environment.setenv(local, "2")
    with pytest.raises(ValueError, match="rank 2 of this machine .* torch sees 2 .*one rank a GPU"):
        choose_device()


def test_tasks_of_srun_are_told_how_to_meet(own_environment) -> None:
    for name, value in STEP.items():
        own_environment.setenv(name, value)
    with (
        pytest.raises(ValueError, match="srun started 6 tasks, .*start torchrun once a node"),
        joined_ranks(),
    ):
        pass
    own_environment.setenv("SLURM_PROCID", "0")
    own_environment.setenv("SLURM_STEP_NUM_TASKS", "1")
    with joined_ranks() as reader:
        assert (reader.rank, reader.world_size) == (0, 1)
