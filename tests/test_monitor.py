"""The window of code counts, and metrics across a restart."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vqrae_ds.monitor import METRICS_FILE, CodeWindow, _drop_entries_after, read_metrics


def counts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_usage_and_perplexity_of_what_is_in_the_window():
    window = CodeWindow(tokens=100)
    window.add(counts(50, 50, 0, 0))
    assert window.usage() == 0.5
    assert window.perplexity() == pytest.approx(2)
    window.add(counts(0, 25, 25, 0))
    assert window.usage() == 0.75


def test_intervals_fall_out_only_while_the_rest_still_fills_the_window():
    window = CodeWindow(tokens=100)
    window.add(counts(60, 0))
    window.add(counts(0, 60))
    assert window.usage() == 1, "60 tokens alone would be too few"
    window.add(counts(0, 60))
    assert window.usage() == 0.5, "the last two intervals hold 120 tokens"


def test_perplexity_of_uneven_use_is_between_one_and_all():
    window = CodeWindow(tokens=10)
    window.add(counts(9, 1, 0))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert window.perplexity() == pytest.approx(math.exp(entropy))


def test_entries_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / METRICS_FILE
    lines = [json.dumps({"step": step, "loss/total": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))
    _drop_entries_after(path, 2)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
