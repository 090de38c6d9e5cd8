"""Disk, hosts, communication, time and advice against sums by hand and the files of a run."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.test_planner import parts_of, run_of
from vqrae_ds.monitoring.flops import encoder_flops, flops_per_image, recomputed_flops
from vqrae_ds.planning import (
    GB,
    RESERVE,
    Bandwidth,
    Plan,
    Speed,
    describe_run,
    describe_sweep,
    disk_bytes,
    fits,
    host_memory,
    peak_bytes,
    plan,
    recommend,
    smallest_fit,
    state_bytes,
    state_bytes_by_kind,
    step_traffic,
    work,
)

DECODER, ENCODER = 5_534_188_108, 5_536_496_000  # parameters, as in test_planner.py
TRAINED = {1: 5_549_149_709 - 2_765_633, 2: 11_082_880_076}  # without the discriminator


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("stage", "reference"), [(1, 12.5), (2, 23.6)])
def test_the_reference_of_16_bytes_at_6b_on_8_gpus(stage: int, reference: float) -> None:
    """Gradients in bf16 as the published arithmetic has them; the recipe sums in fp32: 2 more."""
    bf16 = "deepspeed.data_types.grad_accum_dtype=bf16"
    with_bf16, recipe = (plan(run_of(f"internvit_6b/stage{stage}", *o)) for o in ((bf16,), ()))
    states = [sum(state_bytes(p, 8)) for p in (with_bf16, recipe)]
    generator = sum(
        size
        for part, size in zip(with_bf16.parts, state_bytes(with_bf16, 8), strict=True)
        if part.engine == "generator"
    )
    assert generator / GB == pytest.approx(reference, abs=0.06)
    rest = states[0] - generator  # LPIPS, and in stage 1 the discriminator, whole under ZeRO-1
    assert rest / GB == pytest.approx(0.08 if stage == 1 else 0.06, abs=0.01)
    assert (states[1] - states[0]) / GB == pytest.approx(2 * TRAINED[stage] / 8 / GB, abs=0.02)


def test_kinds_of_states_are_the_parts() -> None:
    for overrides in ((), ("memory.frozen_encoder=resident",), ("deepspeed.bf16.enabled=false",)):
        planned = plan(run_of("internvit_6b/stage2", *overrides))
        assert sum(state_bytes_by_kind(planned, 8)) == pytest.approx(sum(state_bytes(planned, 8)))
    kinds = state_bytes_by_kind(plan(run_of("internvit_6b/stage2")), 8)
    assert kinds.gradients == 4 * TRAINED[2] / 8 and kinds.optimizer == 12 * TRAINED[2] / 8


def test_disk_of_the_6b() -> None:
    """12 bytes a trained parameter, and the frozen encoder once in bf16."""
    no_gan = "losses.adversarial=null"
    disk = disk_bytes(plan(run_of("internvit_6b/stage1", no_gan)))
    assert disk.checkpoint == pytest.approx(12 * TRAINED[1], rel=0.01)
    assert (disk.number, disk.pretrained) == (4, 2 * ENCODER)
    assert disk.total == 4 * disk.checkpoint + disk.pretrained
    more = [no_gan, "ema={decay: 0.999}", "run.epochs=null", "run.total_steps=2000"]
    more.append("deepspeed.scheduler.params.warmup_num_steps=100")
    few = disk_bytes(plan(run_of("internvit_6b/stage1", *more)))
    assert few.number == 2
    assert few.checkpoint - disk.checkpoint == pytest.approx(4 * TRAINED[1])


def test_memory_of_a_host() -> None:
    host = host_memory(plan(run_of("internvit_6b/stage1")), 64)
    assert host.images == 8 * 2 * 8 * 3 * 224**2 * 4 and host.optimizer == 0
    assert host.saving == pytest.approx(4 * TRAINED[1] / 64) and host.ranks == 8
    offload = run_of("internvit_6b/stage1", deepspeed="stage1_zero3_offload")
    host = host_memory(plan(offload), 2)
    assert 2 * host.optimizer == pytest.approx(20 * TRAINED[1]) and host.saving == 0
    assert host.node == 2 * (host.optimizer + host.images)
    one = host_memory(plan(run_of("internvit_6b/stage1", gpus=1)), 1)
    assert one.saving == 4 * 1e9  # of a sub-group


def traffic_of(planned: Plan, gpus: int) -> dict[str, float]:
    return {t.kind: t.size for t in step_traffic(planned, gpus)}


def test_communication_at_6b_by_hand() -> None:
    """64 micro steps on 8 GPUs; half of a reuse distance of 1e9 stays, a third when recomputed."""
    moved = traffic_of(plan(run_of("internvit_6b/stage1", "losses.adversarial=null")), 8)
    codebook = 16384 * 1536
    each = 2 * 64 * 7 / 8  # bf16, micro steps, from others
    assert moved["frozen weights"] == pytest.approx(each * (ENCODER + codebook), rel=0.002)
    assert moved["weights, forward"] == pytest.approx(each * TRAINED[1], rel=0.002)
    assert moved["weights, backward"] == pytest.approx(each * (TRAINED[1] - 1e9 / 3), rel=0.002)
    assert moved["gradients, to their ranks"] == pytest.approx(each * TRAINED[1])
    plain = plan(run_of("internvit_6b/stage1", "memory.decoder_checkpointing=none"))
    assert traffic_of(plain, 8)["weights, backward"] == pytest.approx(
        each * (TRAINED[1] - 5e8), rel=0.002
    )
    resident = plan(run_of("internvit_6b/stage1", "memory.frozen_encoder=resident"))
    assert traffic_of(resident, 8)["frozen weights"] == pytest.approx(each * codebook, rel=0.002)
    assert step_traffic(plan(run_of("internvit_6b/stage1")), 1) == []


def test_nodes_share_what_comes_from_others() -> None:
    """On 64 GPUs 56 of 64 parts come from other nodes, an eighth of them through each port."""
    for traffic in step_traffic(plan(run_of("internvit_6b/stage1", gpus=64)), 64):
        assert traffic.size == pytest.approx(8 * 63 / 56 * traffic.network)
    for traffic in step_traffic(plan(run_of("internvit_6b/stage1")), 8):
        assert traffic.network == 0
    hpz = plan(run_of("internvit_6b/stage1", deepspeed="stage1_zero3_hpz", gpus=64))
    inside = {t.kind: t.network for t in step_traffic(hpz, 64)}
    assert inside["weights, inside the node"] == 0 < inside["weights, first use in a step"]


def test_communication_of_tensor_parallelism_by_hand() -> None:
    size = 4
    tensors = run_of(
        "internvit_6b_tp/stage1", f"deepspeed.tensor_parallel.autotp_size={size}", gpus=64
    )
    kinds = {t.kind: t for t in step_traffic(plan(tensors), 64)}
    assert kinds["weights, forward"].over == 64 // size
    # Two forward, two backward and two again; of 2 bytes; each moves 2 (t - 1) / t of it.
    tokens = tensors.schedule.batch.global_batch * 256 * size / 64
    decoder = tensors.config.model.decoder
    sums = 6 * decoder.num_layers * decoder.hidden_size * tokens + tokens * 1536
    moved = 2 * 2 * (size - 1) / size * sums
    assert kinds["tensor parallelism, sums"].size == pytest.approx(moved)
    assert kinds["tensor parallelism, sums"].network == 0


def test_time_follows_from_flops_or_from_links() -> None:
    planned = plan(run_of("internvit_6b/stage2"))
    flops, speed = flops_per_image(planned.run), Speed(1000, 0.5)
    done = work(planned, 8, speed)
    assert done.flops == flops * 4096
    assert done.step_seconds == done.mfu_seconds == pytest.approx(flops * 4096 / 8 / 0.5e15)
    assert done.gpu_hours == pytest.approx(done.steps * flops * 4096 / 0.5e15 / 3600)
    assert done.images == 4096 * done.steps == pytest.approx(11e9, rel=1e-3)
    # Full checkpointing runs both stacks of blocks once more; embeddings and head are small.
    assert done.recomputed / 4096 == pytest.approx(2 * encoder_flops(planned.run), rel=0.01)
    slow = work(planned, 8, speed._replace(bandwidth=Bandwidth(1e9, 1e9)))
    total = sum(t.size for t in step_traffic(planned, 8))
    assert slow.step_seconds == slow.traffic_seconds == pytest.approx(total / 1e9)
    assert slow.days == pytest.approx(slow.steps * total / 1e9 / 86400)
    none = run_of("internvit_6b/stage2", "memory.decoder_checkpointing=none")
    assert 2 * recomputed_flops(none) == pytest.approx(done.recomputed / 4096, rel=0.01)


@pytest.mark.parametrize("size", [2, 4])
def test_a_group_takes_the_time_of_what_its_ranks_repeat(size: int) -> None:
    """Stage 2 runs the encoder three times forward's FLOPs, its teacher once: on every rank."""
    alone = plan(run_of("internvit_6b_tp/stage2", gpus=8))
    tensors = f"deepspeed.tensor_parallel.autotp_size={size}"
    group = plan(run_of("internvit_6b_tp/stage2", tensors, gpus=8))
    once, done = work(alone, 8, Speed(1000, 0.5)), work(group, 8, Speed(1000, 0.5))
    encoder = encoder_flops(group.run) * 4096
    assert (once.repeated, done.flops) == (0, pytest.approx(once.flops, rel=0.01))
    assert done.repeated == pytest.approx((size - 1) * 4 * encoder, rel=0.01)
    seconds = (done.flops + done.repeated) / 8 / 0.5e15
    assert done.mfu_seconds == pytest.approx(seconds) and done.mfu_seconds > once.mfu_seconds
    again = done.recomputed - once.recomputed
    assert again == pytest.approx((size - 1) * encoder, rel=0.01)
    best = recommend(group, 8, 1000, Speed(1000, 0.5))
    assert best.seconds > seconds, "no setting is faster than what each rank must compute"
    text = describe_run(group, 8, 80, Speed(1000, 0.5))
    share = done.flops / (done.flops + done.repeated) / 2
    assert f"which an MFU does not count: a run shows {share:.1%}" in text


@pytest.mark.parametrize("memory", [40, 80, 141])
def test_the_smallest_number_of_gpus(memory: int) -> None:
    planned = plan(run_of("internvit_6b/stage2"))
    least = smallest_fit(planned, memory)
    assert least.peak == peak_bytes(planned, least.gpus).total <= memory * GB - RESERVE
    assert fits(planned, least.gpus, memory) and not fits(planned, least.gpus // 2, memory)
    assert smallest_fit(planned, 8) is None
    hpz = plan(run_of("internvit_6b/stage2", deepspeed="stage2_zero3_hpz", gpus=64))
    assert smallest_fit(hpz, memory).gpus % 8 == 0
    text = describe_run(planned, 2, 80, None)
    assert "time: not planned without --peak-tflops" in text
    assert f"80 GB a GPU: does not fit on 2; {smallest_fit(planned, 80).gpus} are enough" in text


@pytest.mark.parametrize(("stage", "gpus", "memory"), [(1, 8, 40), (1, 2, 80), (2, 64, 80)])
def test_the_recommended_setting_is_what_its_overrides_give(
    stage: int, gpus: int, memory: int
) -> None:
    recipe = f"internvit_6b/stage{stage}"
    given = plan(run_of(recipe, gpus=gpus))
    best = recommend(given, gpus, memory, Speed())
    taken = plan(run_of(recipe, *best.overrides, gpus=gpus))  # the command line takes them
    assert peak_bytes(taken, gpus).total == pytest.approx(best.peak)
    assert fits(taken, gpus, memory)
    own = work(given, gpus, Speed())
    assert own.mfu_seconds < best.seconds < 1.2 * own.mfu_seconds * (1 + own.recomputed / own.flops)


def test_advice_follows_the_machine() -> None:
    """Slow links make the encoder resident, and little memory takes a smaller micro batch."""

    def words(gpus: int, memory: float, network: float) -> str:
        given = plan(run_of("internvit_6b/stage1", gpus=gpus))
        speed = Speed(bandwidth=Bandwidth(network=network))
        best = recommend(given, gpus, memory, speed)
        return "" if best is None else " ".join(best.overrides)

    assert "frozen_encoder=sharded" in words(64, 80, 50e9)
    assert "frozen_encoder=resident" in words(512, 80, 0.5e9)
    numbers = (re.search(r"per_gpu=(\d+)", words(gpus, 80, 50e9)) for gpus in (2, 8))
    few, more = (int(found[1]) for found in numbers)
    assert few < more
    assert words(1, 80, 50e9) == ""


def test_a_sweep_is_a_row_for_each_number() -> None:
    plans = []
    for gpus in (8, 64):
        plans.append(plan(run_of("internvit_6b/stage1", gpus=gpus)))
    head, *rows = (line.split() for line in describe_sweep(plans, Speed(), 80).splitlines())
    assert [row[:2] for row in rows] == [["8", "64"], ["64", "8"]]
    for planned, row in zip(plans, rows, strict=True):
        assert float(row[3]) == pytest.approx(peak_bytes(planned, int(row[0])).total / GB, abs=0.01)
        hours = work(planned, int(row[0]), Speed()).gpu_hours
        assert float(row[-1].replace(",", "")) == pytest.approx(hours, abs=1)
    assert "hours" not in describe_sweep(plans, None, 80)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_figures_of_the_readme(stage: int) -> None:
    planned = plan(run_of(f"internvit_6b/stage{stage}", gpus=8))
    moved, done = sum(traffic_of(planned, 8).values()), work(planned, 8, Speed())
    row = (
        f"| {stage} | {sum(state_bytes(planned, 8)) / GB:.1f} GB a GPU "
        f"| {peak_bytes(planned, 8).total / GB:.1f} GB "
        f"| {moved / 1e12:.1f} TB, {done.traffic_seconds:.0f} s at 400 GB/s "
        f"| {done.step_seconds:.0f} s | {disk_bytes(planned).total / GB:.0f} GB |"
    )
    assert row in (ROOT / "README.md").read_text()


def test_parts_of_the_hand_sums() -> None:
    for stage in (1, 2):
        parts = parts_of(plan(run_of(f"internvit_6b/stage{stage}")))
        own = [p for p in parts.values() if p.kind == "trained" and p.engine == "generator"]
        assert sum(part.count for part in own) == TRAINED[stage]
        assert parts["decoder"].count == DECODER and parts["encoder"].count == ENCODER
