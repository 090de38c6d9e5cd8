"""The window of code counts, and metrics across a restart."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vqrae_ds.evaluation.summary import METRICS_FILE, read_metrics
from vqrae_ds.monitor import (
    CodeWindow,
    _drop_entries_after,
    perplexity,
    usage,
)


class Codes:
    """The part of SimVQ that counts."""

    def __init__(self) -> None:
        self.code_counts = torch.zeros(4, dtype=torch.int64)

    def use(self, *counts: int) -> Codes:
        self.code_counts = torch.tensor(counts)
        return self

    def reset_codebook_usage(self) -> None:
        self.code_counts.zero_()


def test_window_holds_the_last_steps_that_have_its_tokens():
    window, codes = CodeWindow(tokens=150, tokens_per_step=100), Codes()
    window.add_step(codes.use(100, 0, 0, 0))
    assert codes.code_counts.sum() == 0, "each step starts anew"
    assert window.counts().tolist() == [100, 0, 0, 0]
    window.add_step(codes.use(0, 100, 0, 0))
    assert window.counts().tolist() == [100, 100, 0, 0], "one step alone would be too few"
    window.add_step(codes.use(0, 60, 40, 0))
    assert window.counts().tolist() == [0, 160, 40, 0]


def test_usage_and_perplexity():
    assert usage(torch.tensor([50.0, 50.0, 0.0, 0.0])) == 0.5
    assert perplexity(torch.tensor([50.0, 50.0, 0.0, 0.0])) == pytest.approx(2)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert perplexity(torch.tensor([9.0, 1.0, 0.0])) == pytest.approx(math.exp(entropy))


def test_entries_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / METRICS_FILE
    lines = [json.dumps({"step": step, "loss/total": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))
    _drop_entries_after(path, 2)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
