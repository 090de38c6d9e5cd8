"""The guard alone: what is sound, and what it learns. Ranks: integration/test_faults."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from vqrae_ds.config import GuardConfig
from vqrae_ds.guard import LARGEST, UNLIMITED, Guard

RECONSTRUCTION = "loss/reconstruction"
# Of the mean squared errors of single images, in natural logarithms: 3.8 dB of PSNR.
SPREAD = 3.8 / 10 * math.log(10)


def terms_of(**values: float) -> dict[str, torch.Tensor]:
    names = {"rec": "loss/reconstruction", "lpips": "loss/perceptual", "adv": "loss/adversarial"}
    return {names.get(k, f"loss/{k}"): torch.tensor(v) for k, v in values.items()}


def is_sound(guard: Guard, **values: float) -> bool:
    factor = guard.judge(terms_of(**values))
    assert factor == 1.0 or factor.isnan()
    return not factor.isnan().item()


def learn(guard: Guard, **values: float) -> None:
    """A logged window in which these were the largest on any rank."""
    guard.learn({f"loss/{name}{LARGEST}": value for name, value in values.items()})


def end_window(guard: Guard) -> None:
    """As a run of one rank does at a logged step."""
    guard.learn({name + LARGEST: value.item() for name, value in guard.largest().items()})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_any_term_that_is_not_finite_is_unsound(bad):
    guard = Guard(GuardConfig(spike_factor=None))
    assert is_sound(guard, rec=1e30, total=-3.0)
    assert not is_sound(guard, rec=0.1, quantizer=bad)
    assert not is_sound(guard, rec=bad)


def test_a_jump_is_unsound_once_the_level_is_known():
    guard = Guard(GuardConfig(spike_factor=10.0))
    assert is_sound(guard, rec=1e6), "nothing is known yet"
    learn(guard, reconstruction=0.02, total=5.0)
    assert is_sound(guard, rec=0.19, total=1e9) and not is_sound(guard, rec=0.21, total=5.0)
    assert Guard(GuardConfig(spike_factor=None)).limit(RECONSTRUCTION) == UNLIMITED


def test_healthy_images_are_all_taken_one_by_one_and_a_spike_is_not():
    guard = Guard(GuardConfig(spike_factor=10.0))
    draw = torch.Generator().manual_seed(0)
    errors = 0.01 * torch.exp(SPREAD * torch.randn(100_000, generator=draw))
    above_the_mean = (errors > 10 * errors.mean()).sum().item()
    assert above_the_mean > 30, "a limit at ten times the mean would have skipped these"
    factors = []
    for number, error in enumerate(errors, start=1):
        factors.append(guard.judge({RECONSTRUCTION: error}))
        guard.step_taken()
        if number % 50 == 0:
            end_window(guard)
    assert not torch.stack(factors).isnan().any()
    assert not is_sound(guard, rec=1000 * errors.mean().item())
    end_window(guard)
    assert not is_sound(guard, rec=1000 * errors.mean().item()), "a spike is no level"


def test_hinge_losses_are_judged_by_their_margin_and_by_magnitude():
    guard = Guard(GuardConfig(spike_factor=10.0))
    assert is_sound(guard, adv=-9.9) and not is_sound(guard, adv=-10.1)
    learn(guard, adversarial=0.01)
    assert is_sound(guard, adv=9.9), "a level near zero is no scale"
    learn(guard, adversarial=4.0)
    assert is_sound(guard, adv=39.0) and not is_sound(guard, adv=-41.0)


def test_a_level_rises_at_once_and_falls_slowly_and_only_by_what_was_sound():
    guard = Guard(GuardConfig(spike_factor=10.0))
    learn(guard, reconstruction=1.0)
    assert is_sound(guard, rec=-5.0) and is_sound(guard, rec=2.0)
    assert not is_sound(guard, rec=11.0), "limits change at the end of a window"
    assert not is_sound(guard, rec=3.0, lpips=math.nan), "nor is what stands beside something bad"
    assert {n: v.item() for n, v in guard.largest().items()}[RECONSTRUCTION] == 5.0
    end_window(guard)
    assert guard.levels[RECONSTRUCTION] == 5.0 and not guard.largest()
    learn(guard, reconstruction=0.1)
    assert guard.levels[RECONSTRUCTION] == 4.5
    assert not is_sound(guard, rec=1e3)
    end_window(guard)
    assert guard.levels[RECONSTRUCTION] == 4.5, "a window without a sound micro batch says nothing"
    for _ in range(25):
        learn(guard, reconstruction=0.1)
    assert 0.1 <= guard.levels[RECONSTRUCTION] < 0.4


def test_quantizer_and_convnext_losses_are_watched_and_distillation_need_only_be_finite():
    guard = Guard(GuardConfig(spike_factor=10.0))
    terms = {"quantizer": 0.1, "convnext": 0.2, "distillation_teacher": 0.1}
    learn(guard, **terms)
    assert is_sound(guard, **(terms | {"distillation_teacher": 100.0}))
    assert not is_sound(guard, **(terms | {"quantizer": 1.1}))
    assert not is_sound(guard, **(terms | {"convnext": 2.1}))


@pytest.mark.parametrize("bad", [math.nan, 1e6])
def test_many_skipped_steps_are_warned_of(one_rank, caplog, bad):
    guard = Guard(GuardConfig(spike_factor=10.0))
    learn(guard, reconstruction=1.0)
    with caplog.at_level(logging.WARNING, "vqrae_ds.guard"):
        for skipped in (1, 2):
            caplog.clear()
            for step in range(50):
                guard.judge(terms_of(rec=bad if step < skipped else 1.0))
                if step < skipped:
                    guard.step_skipped(step)
                else:
                    guard.step_taken()
            end_window(guard)
            said = [m for m in caplog.messages if "of the last 50 steps were skipped" in m]
            assert len(said) == (skipped > 1)
    assert said[0].startswith("2 of")
    way_out = "if these losses are healthy, raise guard.spike_factor = 10.0"
    assert (way_out in said[0]) == math.isfinite(bad), "no factor lets a NaN through"


def test_state_survives_json_bit_for_bit():
    guard = Guard(GuardConfig())
    guard.learn({"loss/perceptual_largest": 1 / 3, "gan/discriminator_largest": 0.1 + 0.2})
    assert len(guard.levels) == 2
    again = Guard(GuardConfig(), json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()


def test_limits_follow_the_terms_that_are_there():
    guard = Guard(GuardConfig(spike_factor=2.0))
    learn(guard, perceptual=1.0)
    assert not is_sound(guard, rec=0.1, lpips=3.0)
    assert is_sound(guard, rec=3.0), "another set of terms, in another order"
    assert not is_sound(guard, lpips=3.0, rec=0.1)
