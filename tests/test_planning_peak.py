"""The predicted peak of a step against sums by hand, and how the tool shows it."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.test_planner import run_of
from vqrae_ds.planning import (
    GB,
    RESERVE,
    Peak,
    describe_plan,
    host_bytes,
    peak_bytes,
    plan,
    state_bytes,
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_moving_average_is_divided_or_on_the_host() -> None:
    recipe, ema = "internvit_6b/stage1", "ema={decay: 0.999}"
    planned = plan(run_of(recipe, ema))
    trained = sum(p.count for p in planned.parts if p.kind == "trained" and "disc" not in p.name)
    assert peak_bytes(planned, 8).ema == pytest.approx(4 * trained / 8)
    assert peak_bytes(plan(run_of(recipe)), 8).ema == 0 == host_bytes(planned)
    offloaded = plan(run_of(recipe, ema, deepspeed="stage1_zero3_offload"))
    assert peak_bytes(offloaded, 2).ema == 0
    assert host_bytes(offloaded) == pytest.approx((20 + 4) * trained)
    text = describe_plan(offloaded, 2, 80)
    assert f"host: {24 * trained / GB:.1f} GB over all ranks" in text


def test_the_sum_by_hand_at_6b() -> None:
    """bf16, micro batch 8, 256 tokens of 3200: 45 inputs of blocks kept, and what passes."""
    planned = plan(run_of("internvit_6b/stage1"))
    peak = peak_bytes(planned, 8)
    micro_step = peak.gathered + peak.buckets + peak.activations
    assert isinstance(peak, Peak) and micro_step > peak.optimizer_step
    assert peak.total == pytest.approx(peak.states + peak.ema + micro_step)
    decoder = 5_534_188_108  # bytes: two fp32 vectors like an eighth of it
    assert peak.optimizer_step == pytest.approx(decoder, rel=0.01)
    assert peak.states == pytest.approx(sum(state_bytes(planned, 8)))
    # Half of a reuse distance of 1e9 stays, 5e8 are fetched ahead: no more than 1e9 live.
    assert peak.gathered == pytest.approx(2 * 1e9, rel=0.01)
    assert peak.buckets == 2 * 2 * 5e8
    lpips = 8 * 224**2 * (270 + 90 + 2 * 122 + 3 * 122) * 4
    codes = 16384 * (2 * 1536 + 4)  # projected, in bf16, and a norm in fp32
    assert peak.activations == pytest.approx(45 * 2 * 8 * 256 * 3200 + lpips + codes, rel=0.1)
    more = "deepspeed.train_micro_batch_size_per_gpu=16"
    doubled = peak_bytes(plan(run_of("internvit_6b/stage1", more)), 8)
    assert doubled.activations - codes == pytest.approx(2 * (peak.activations - codes), rel=0.01)


def test_buffers_follow_the_json() -> None:
    def peak(*overrides: str, deepspeed: str = "") -> Peak:
        return peak_bytes(plan(run_of("internvit_6b/stage1", *overrides, deepspeed=deepspeed)), 2)

    zero = "deepspeed.zero_optimization."
    small = peak(f"{zero}stage3_max_live_parameters=2e8", f"{zero}stage3_max_reuse_distance=2e8")
    assert small.gathered == pytest.approx(2 * 2e8, rel=0.05)
    block = 122_931_456  # a block of the decoder, as in test_planner.py
    least = (f"{zero}stage3_max_reuse_distance=0", f"{zero}stage3_prefetch_bucket_size=0")
    assert peak(*least).gathered == pytest.approx(2 * block, rel=0.03)
    whole = peak(f"{zero}memory_efficient_linear=false", "memory.decoder_checkpointing=none")
    assert whole.gathered > 2 * 5.5e9
    # The discriminator is ZeRO-1 with gradients in fp32, for which there is no bucket.
    low = peak(deepspeed="stage1_zero3_one_gpu")
    assert low.buckets == 2 * 5e7 * 2
    one = plan(run_of("internvit_300m/stage1", deepspeed="stage1_one_gpu", gpus=1))
    assert (peak_bytes(one, 1).gathered, peak_bytes(one, 1).buckets) == (0, 5e7 * 2)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed=0", "11.1 GB from all GPUs, 10.9 GB of it"),
        ("memory.frozen_encoder=resident", "nothing, it is resident"),
        ("deepspeed.zero_optimization.zero_hpz_partition_size=8", "11.1 GB inside the node, 9.7"),
    ],
)
def test_what_a_frozen_encoder_gathers(override: str, expected: str) -> None:
    text = describe_plan(plan(run_of("internvit_6b/stage1", override, gpus=64)), 64, 80)
    assert f"gathered in a micro step for the frozen encoder: {expected}" in text


def test_the_verdict_goes_by_the_peak_and_the_reserve() -> None:
    planned = plan(run_of("internvit_6b/stage1"))
    peak, reserve = peak_bytes(planned, 8).total / GB, RESERVE / GB
    assert f"the peak of {peak:.1f} GB fits into" in describe_plan(planned, 8, peak + reserve + 0.1)
    too_little = describe_plan(planned, 8, peak + reserve - 0.1)
    assert f"the peak of {peak:.1f} GB does not fit into" in too_little
    assert "\nit fits from 16 GPUs on" in too_little
