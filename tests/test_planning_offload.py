"""What an offloaded optimizer costs in a step: bytes by hand, times, and how they are shown."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import ROOT
from tests.test_planner import run_of
from vqrae_ds.planning import (
    GB,
    Bandwidth,
    Plan,
    Speed,
    describe_run,
    describe_sweep,
    host_bytes,
    plan,
    recommend,
    step_offload,
    work,
)
from vqrae_ds.planning.offload import ADAMW_PASSES

RECIPE, JSON = "internvit_6b/stage1", "stage1_zero3_offload"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def offloaded(*overrides: str, gpus: int = 2) -> Plan:
    return plan(run_of(RECIPE, *overrides, deepspeed=JSON, gpus=gpus))


def trained_in(planned: Plan) -> int:
    own = (part for part in planned.parts if part.engine == "generator")
    return sum(part.held for part in own if part.kind == "trained")


def test_bytes_by_hand() -> None:
    """16 micro steps, each with fp32 gradients there and back; at the end a master's gradient."""
    planned = offloaded()
    assert planned.run.schedule.batch.accumulation == 16
    moved, share = step_offload(planned, 2), trained_in(planned) / 2
    assert moved.gradients == pytest.approx(share * (16 * 2 * 4 + 4))
    assert moved.weights == 2 * share
    assert moved.update == pytest.approx(2 * share * 4 * (20 + 4))
    averaged = step_offload(offloaded("ema={decay: 0.999}"), 2)
    assert averaged.update - moved.update == pytest.approx(2 * share * 4 * 3)
    assert step_offload(plan(run_of(RECIPE)), 8) is None
    many = step_offload(offloaded(gpus=32), 32)
    assert many.update == pytest.approx(moved.update / 4), "8 of 32 ranks are in a node"


class Passes(TorchDispatchMode):
    """Counts vectors of a length that operators read or write: arguments, and new results."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.count = length, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {id(x): x for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        self.count += sum(x.numel() == self.length for x in (*given.values(), *made.values()))
        return result


def test_adamw_passes_are_those_of_pytorch() -> None:
    weight = torch.nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
    for _ in range(2):  # the first one makes the moments
        weight.grad = torch.randn(1000)
        with Passes(1000) as passes:
            optimizer.step()
    assert passes.count == ADAMW_PASSES


def test_a_step_waits_for_the_host() -> None:
    planned, moved = offloaded(), step_offload(offloaded(), 2)
    fast, slow = Bandwidth(bus=1e15, host_memory=1e11), Bandwidth(bus=1e9, host_memory=1e15)
    done = work(planned, 2, Speed(bandwidth=fast))
    assert done.mfu_seconds > done.traffic_seconds > done.offload.beside
    assert done.offload.after == pytest.approx(moved.update / 1e11, rel=1e-3)
    assert done.step_seconds == done.mfu_seconds + done.offload.after
    assert done.gpu_hours == pytest.approx(2 * done.steps * done.step_seconds / 3600)
    done = work(planned, 2, Speed(bandwidth=slow))
    assert done.offload.beside == moved.gradients / 1e9 > done.mfu_seconds
    assert done.step_seconds == pytest.approx((moved.gradients + moved.weights) / 1e9, rel=1e-3)
    best = recommend(planned, 2, 80, Speed(bandwidth=fast))
    assert best.seconds > moved.update / 1e11 + done.mfu_seconds


def test_the_figures_of_the_page() -> None:
    page = (ROOT / "ds_configs" / "README.md").read_text().replace("\n", " ")
    few = offloaded("deepspeed.train_micro_batch_size_per_gpu=64", gpus=1)
    many, few = (work(planned, 1, Speed()) for planned in (offloaded(gpus=1), few))
    assert f"one GPU takes {many.mfu_seconds:.0f} s of computing for a step of 256 images" in page
    beside = (many.offload.beside, few.offload.beside)
    moves = "32 micro steps move gradients for {:.0f} s at 50 GB/s, 4 for {:.0f} s"
    assert moves.format(*beside) in page


def test_a_fit_says_what_it_takes_of_the_hosts() -> None:
    planned, done = offloaded(), work(offloaded(), 2, Speed())
    host = f"{host_bytes(planned) / GB:.1f}"
    assert host == "110.9"
    text = describe_run(planned, 2, 80, Speed())
    assert f"1 is enough, at a peak of 25.2 GB and {host} GB of the hosts' memory" in text
    beside, after = done.offload
    assert f"GB in {beside:,.2f} s at 50 GB/s: it is longer, so the step takes that" in text
    assert f"then the step waits {after:,.2f} s for the update" in text
    head, row = (line.split("  ") for line in describe_sweep([planned], Speed(), 80).splitlines())
    assert [cell.strip() for cell in head if cell].count("hosts GB") == 1
    assert host in [cell.strip() for cell in row]
    assert "host" not in describe_sweep([plan(run_of(RECIPE))], Speed(), 80)


def test_the_step_takes_one_of_the_times() -> None:
    slow = Speed(bandwidth=Bandwidth(node=5e10))
    done = work(offloaded(), 2, slow)
    assert done.mfu_seconds < done.traffic_seconds < done.offload.beside
    text = describe_run(offloaded(), 2, 80, slow)
    assert f"communication takes {done.traffic_seconds:,.2f} s at 50 GB/s" in text
    assert text.count("it is longer") == 2 and text.count("so the step takes that") == 1
