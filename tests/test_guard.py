"""The guard alone: what is sound, what its running means become. Ranks: integration/test_faults."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vqrae_ds.config import GuardConfig
from vqrae_ds.guard import LARGEST, Guard


def terms_of(**values: float) -> dict[str, torch.Tensor]:
    names = {"rec": "loss/reconstruction", "lpips": "loss/perceptual", "adv": "loss/adversarial"}
    return {names.get(k, f"loss/{k}"): torch.tensor(v) for k, v in values.items()}


def is_sound(guard: Guard, **values: float) -> bool:
    factor = guard.judge(terms_of(**values))
    assert factor == 1.0 or factor.isnan()
    return not factor.isnan().item()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_any_term_that_is_not_finite_is_unsound(bad):
    guard = Guard(GuardConfig(spike_factor=None))
    assert is_sound(guard, rec=1e30, total=-3.0)
    assert not is_sound(guard, rec=0.1, quantizer=bad)
    assert not is_sound(guard, rec=bad)


def test_a_jump_is_unsound_once_the_level_is_known():
    guard = Guard(GuardConfig(spike_factor=10.0))
    assert is_sound(guard, rec=1e6), "nothing is known yet"
    guard.learn({"loss/reconstruction": 0.02, "loss/total": 5.0})
    assert is_sound(guard, rec=0.19, total=1e9) and not is_sound(guard, rec=0.21, total=5.0)
    assert Guard(GuardConfig(spike_factor=None)).limit("loss/reconstruction") == LARGEST


def test_hinge_losses_are_judged_by_their_margin_and_by_magnitude():
    guard = Guard(GuardConfig(spike_factor=10.0))
    assert is_sound(guard, adv=-9.9) and not is_sound(guard, adv=-10.1)
    guard.learn({"loss/adversarial": -0.01})
    assert is_sound(guard, adv=9.9), "a level near zero is no scale"
    guard.learn({"loss/adversarial": 8.0})
    assert is_sound(guard, adv=39.0) and not is_sound(guard, adv=-41.0)


def test_one_outlier_lifts_the_limit_by_half_of_a_jump_and_a_new_level_is_accepted():
    guard = Guard(GuardConfig(spike_factor=10.0))
    guard.learn({"loss/reconstruction": 1.0})
    guard.learn({"loss/reconstruction": 1e6})
    assert guard.means["loss/reconstruction"] == 5.5
    guard.learn({"loss/reconstruction": math.nan})
    assert guard.means["loss/reconstruction"] == 5.5
    for _ in range(3):
        guard.learn({"loss/reconstruction": 100.0})
    assert is_sound(guard, rec=100.0)


def test_state_survives_json_bit_for_bit():
    guard = Guard(GuardConfig())
    guard.learn({"loss/perceptual": 1 / 3, "gan/discriminator": 0.1 + 0.2})
    again = Guard(GuardConfig(), json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()


def test_limits_follow_the_terms_that_are_there():
    guard = Guard(GuardConfig(spike_factor=2.0))
    guard.learn({"loss/perceptual": 1.0})
    assert not is_sound(guard, rec=0.1, lpips=3.0)
    assert is_sound(guard, rec=3.0), "another set of terms, in another order"
    assert not is_sound(guard, lpips=3.0, rec=0.1)
