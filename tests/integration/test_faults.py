"""Numbers that go bad on one rank, caused on two real ranks: what is promised for each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.integration.test_memory_keys import BF16_STATES, NODE, ZERO3
from tests.tiny import GAN, images_of, make_rank_folders, make_run, make_setup
from vqrae_ds.guard import LARGEST
from vqrae_ds.losses.perceptual import PerceptualLoss

pytestmark = pytest.mark.slow

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
SCHEDULE = {
    "type": "WarmupCosineLR",
    "params": {"warmup_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.1},
}
ENGINES = {  # the guard builds on what each does with a gradient that is not finite
    "zero3": {},
    "zero3_bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2_bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero3_offload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "zero3_x2": {"train_batch_size": 8},  # two micro batches a step, the first of them is bad
    "zero3_bf16_states": {"bf16": {"enabled": True} | BF16_STATES},
    "moving_codes": {},  # the codebook of moving averages learns in the forward pass
    # Last, for it makes groups of ranks for the rest of the process.
    "zero3_hpz": {"zero_optimization": {**ZERO3, "zero_hpz_partition_size": NODE}},
}


def state_of(setup) -> dict[str, torch.Tensor]:
    """All that a skipped step must leave as it is: this rank's masters, averages, D's weights."""
    from vqrae_ds.sharding.partitions import masters

    state = {f"master{i}": m.clone() for i, m in enumerate(masters(setup.generator))}
    averages = setup.ema.state_dict()["averages"]
    state |= {f"average{i}": m.clone() for i, m in enumerate(averages)}
    codes = dict(setup.generator.module.vqrae.quantizer.named_buffers())  # averages or none
    del codes["code_counts"]
    stored = setup.discriminator.module.state_dict() | codes  # the averages of LeCam too
    return state | {n: t.clone() for n, t in stored.items()}


def take(setup, images: torch.Tensor, step: int) -> bool:
    """One step of the trainer. Whether it was taken."""
    from vqrae_ds.train import finish_step, micro_step

    before = setup.guard.skipped_steps
    micro_step(setup, images, step)
    for _ in range(setup.generator.gradient_accumulation_steps() - 1):
        micro_step(setup, images_of(100 + step, 0), step)
    finish_step(setup, step)
    if setup.guard.skipped_steps == before:
        largest = setup.guard.largest()
        setup.guard.learn({name + LARGEST: value.item() for name, value in largest.items()})
    return setup.guard.skipped_steps == before


def break_things(rank: int, folder: Path, lpips: Path) -> None:
    for name, deepspeed in ENGINES.items():
        model = {"use_simvq": name != "moving_codes"}
        report = break_engine(rank, folder / f"rank{rank}", deepspeed, model, lpips)
        (folder / f"{name}{rank}.json").write_text(json.dumps(report))


def break_engine(rank: int, folder: Path, deepspeed: dict, model: dict, lpips: Path) -> dict:
    from vqrae_ds.sharding import parameter_groups

    losses = {
        "perceptual": {"weight": 0.1, "weights": str(lpips)},
        "adversarial": {"weight": 0.1, "lecam_weight": 0.01, **GAN},
    }
    run = make_run(
        folder,
        1,
        losses=losses,
        deepspeed={"optimizer": ADAMW, "scheduler": SCHEDULE, **deepspeed},
        model=model,
        init={"model": None, "allow_untrained_encoder": True},
        ema={"decay": 0.9},
        guard={"max_skipped_steps": 2},
    )
    setup = make_setup(run, PerceptualLoss(lpips))
    step, report = 0, {}

    def attempt(what: str, images: torch.Tensor) -> None:
        nonlocal step
        setup.objective.settle()  # what waits from the step before belongs to that one
        before = state_of(setup)
        taken = take(setup, images, step)
        after = state_of(setup)
        step += 1
        report[what] = {
            "taken": taken,
            "unchanged": all(torch.equal(before[n], after[n]) for n in before),
            "finite": all(bool(t.isfinite().all()) for t in after.values()),
            "culprits": [tuple(c) for c in setup.guard.culprits],
            "reason": setup.guard.reason(),
            "in_a_row": setup.guard.skipped_in_a_row,
            "must_stop": setup.guard.must_stop(),
            "rates": parameter_groups.learning_rates(setup.generator, setup.discriminator),
        }

    attempt("first", images_of(0, rank))
    attempt("second", images_of(1, rank))
    broken = images_of(2, rank)
    if rank == 1:
        broken[0, 0, 0, 0] = math.nan
    attempt("nan", broken)
    attempt("after_nan", images_of(3, rank))
    attempt("spike", images_of(4, rank) * (50.0 if rank == 0 else 1.0))
    attempt("after_spike", images_of(5, rank))
    attempt("zeros", torch.zeros_like(images_of(0, rank)))
    attempt("zeros_on_one_rank", images_of(6, rank) * rank)
    with torch.no_grad():  # as a discriminator does whose learning rate is far too high
        for parameter in setup.discriminator.module.parameters():
            parameter.mul_(100.0)
    attempt("exploded", images_of(7, rank))
    attempt("exploded_still", images_of(8, rank))
    return report


@pytest.fixture(scope="module", params=ENGINES)
def reports(request, broken) -> list[dict]:
    return [json.loads((broken / f"{request.param}{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def broken(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_rank_folders(folder, 2)
    run_ranks(2, break_things, folder, lpips_weights)
    return folder


def test_a_nan_on_one_rank_is_skipped_by_all_and_named(reports):
    for report in reports:
        nan = report["nan"]
        assert not nan["taken"] and nan["unchanged"] and nan["finite"]
        assert {(rank, name) for rank, name, *_ in nan["culprits"]} >= {(1, "loss/reconstruction")}
        assert all(rank == 1 for rank, *_ in nan["culprits"]), "rank 0 only caught it"
        assert "nan on rank 1" in nan["reason"]
        assert report["after_nan"]["taken"] and not report["after_nan"]["unchanged"]
        assert report["after_nan"]["in_a_row"] == 0


def test_a_jump_on_one_rank_is_skipped_by_all_and_named(reports):
    for report in reports:
        spike = report["spike"]
        assert not spike["taken"] and spike["unchanged"]
        named = {(rank, name): (value, limit) for rank, name, value, limit in spike["culprits"]}
        value, limit = named[0, "loss/reconstruction"]
        assert value > limit > 0
        assert report["after_spike"]["taken"]


def test_learning_rates_follow_the_steps_through_skipped_ones(reports):
    for report in reports:
        for number, what in enumerate(("first", "second", "nan", "after_nan"), start=1):
            expected = 1e-3 * min(number / 4, 1.0)  # of the step that comes next
            for rate in report[what]["rates"].values():
                assert rate == pytest.approx(expected, rel=1e-3), what


def test_black_images_are_images_like_others(reports):
    for report in reports:
        for what in ("zeros", "zeros_on_one_rank"):
            assert report[what]["finite"]
            assert report[what]["taken"], report[what]["reason"]


def test_an_exploded_discriminator_does_not_reach_the_generator_and_ends_the_run(reports):
    for report in reports:
        for what in ("exploded", "exploded_still"):
            assert not report[what]["taken"] and report[what]["unchanged"]
            assert any(name == "loss/adversarial" for _, name, *_ in report[what]["culprits"])
        assert not report["exploded"]["must_stop"] and report["exploded_still"]["must_stop"]
