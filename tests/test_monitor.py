"""The window of code counts, and metrics across a restart."""

from __future__ import annotations

import json

import torch

from vqrae_ds.evaluation.summary import METRICS_FILE, read_metrics
from vqrae_ds.models.quantizer import Quantizer
from vqrae_ds.monitor import CodeWindow, _drop_entries_after


class Codes(Quantizer):
    """A quantiser that only counts."""

    def use(self, *counts: int) -> Codes:
        self.code_counts.copy_(torch.tensor(counts))
        return self


def test_window_holds_the_last_steps_that_have_its_tokens():
    window, codes = CodeWindow(tokens=150, tokens_per_step=100), Codes(4, 1)
    window.add_step(codes.use(100, 0, 0, 0))
    assert codes.code_counts.sum() == 0, "each step starts anew"
    assert window.counts().tolist() == [100, 0, 0, 0]
    window.add_step(codes.use(0, 100, 0, 0))
    assert window.counts().tolist() == [100, 100, 0, 0], "one step alone would be too few"
    window.add_step(codes.use(0, 60, 40, 0))
    assert window.counts().tolist() == [0, 160, 40, 0]


def test_entries_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / METRICS_FILE
    lines = [json.dumps({"step": step, "loss/total": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))
    _drop_entries_after(path, 2)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
