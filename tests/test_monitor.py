"""The window of code counts, sums of terms on the device, and what a logged step writes."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import NUM_CODES, make_run, save_initial
from vqrae_ds.evaluation.curves import read_curves, read_tensorboard
from vqrae_ds.evaluation.metrics import Validation
from vqrae_ds.evaluation.summary import METRICS_FILE, read_metrics
from vqrae_ds.models.quantizer import Quantizer
from vqrae_ds.monitoring.log_line import log_line
from vqrae_ds.monitoring.monitor import CodeWindow, Monitor, usage_histogram
from vqrae_ds.monitoring.run_log import drop_entries_after
from vqrae_ds.monitoring.term_sums import TermSums, sum_over_ranks


class Codes(Quantizer):
    """A quantiser that only counts."""

    def use(self, *counts: int) -> Codes:
        self.code_counts.copy_(torch.tensor(counts))
        return self


class NoReadback(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def run(tmp_path):
    save_initial(tmp_path / "initial")
    return make_run(tmp_path, 1, world_size=1)


def log_steps(run, first: int, last: int) -> Monitor:
    """A logged step for each number, with other values and other codes each."""
    monitor, codes = Monitor(run, step=first - 1), Codes(NUM_CODES, 1)
    for step in range(first, last + 1):
        monitor.add({"loss/total": torch.tensor(1 / step), "loss/reconstruction": torch.rand(())})
        if step % 2 == 0:
            monitor.add({"loss/perceptual": torch.tensor(float(step))})
        codes.code_counts[:step] = step
        monitor.window.add_step(codes)
        monitor.log(step, 4 * step, {"decoder": 0.1 / step}, {"optim/skipped_steps": step // 3})
    return monitor


def test_window_holds_the_last_steps_that_have_its_tokens():
    window, codes = CodeWindow(tokens=150, tokens_per_step=100), Codes(4, 1)
    window.add_step(codes.use(100, 0, 0, 0))
    assert codes.code_counts.sum() == 0, "each step starts anew"
    assert window.counts().tolist() == [100, 0, 0, 0]
    window.add_step(codes.use(0, 100, 0, 0))
    assert window.counts().tolist() == [100, 100, 0, 0], "one step alone would be too few"
    window.add_step(codes.use(0, 60, 40, 0))
    assert window.counts().tolist() == [0, 160, 40, 0]


def test_histogram_counts_codes_by_powers_of_two():
    counts = torch.tensor([0, 0, 0, 1, 2, 3, 4, 7, 8, 15, 16, 1023], dtype=torch.float64)
    assert usage_histogram(counts) == [3, 1, 2, 2, 2, 1, 0, 0, 0, 0, 1]
    assert usage_histogram(torch.zeros(5)) == [5]


def test_terms_that_are_not_finite_are_counted_out(one_rank):
    terms = TermSums()
    terms.add({"a": torch.tensor(1.0), "b": torch.tensor(math.nan)})
    terms.add({"a": torch.tensor(math.inf), "b": torch.tensor(4.0)})
    terms.add({"a": torch.tensor(2.0)})
    terms.add({"c": torch.tensor(-math.inf)})
    means = terms.means(sum_over_ranks(terms.vectors(), []).sums)
    assert means["a"] == (1.5, 2, 1)
    assert means["b"] == (4.0, 1, 1)
    assert math.isnan(means["c"].mean) and means["c"][1:] == (0, 1)


def test_between_logged_steps_nothing_is_read_back_from_the_device(one_rank, run):
    monitor, codes = Monitor(run, step=0), Codes(NUM_CODES, 1)
    with NoReadback():
        for value in (1.0, math.nan):
            monitor.add({"loss/total": torch.tensor(value)})
            monitor.window.add_step(codes)
        monitor.add_gradients({"decoder": torch.tensor(9.0)})
    with pytest.raises(AssertionError, match="read back"):  # the check itself finds what it should
        with NoReadback():
            torch.tensor(1.0).item()
    entry = monitor.log(2, 8, {})
    monitor.close()
    assert entry["loss/total"] == 1.0
    assert entry["optim/nonfinite_terms"] == 1
    assert entry["optim/gradient_norm_decoder"] == entry["optim/gradient_norm_generator"] == 3


def test_what_is_not_finite_is_in_no_entry_and_the_file_stays_json(one_rank, run):
    monitor = Monitor(run, step=0)
    monitor.add({"loss/total": torch.tensor(math.nan), "loss/quantizer": torch.tensor(0.5)})
    monitor.add_gradients({"encoder": torch.tensor(math.inf), "decoder": torch.tensor(4.0)})
    monitor.window.add_step(Codes(NUM_CODES, 1))
    numbers = {"optim/gradient_norm_discriminator": math.nan, "optim/skipped_steps": 1}
    entry = monitor.log(1, 4, {}, numbers)
    monitor.log_validation(1, Validation({"validation/psnr": math.inf}, *torch.rand(2, 1, 3, 8, 8)))
    monitor.close()
    assert entry["optim/nonfinite_terms"] == 4
    assert "loss/total" not in entry and "optim/gradient_norm_generator" not in entry
    assert entry["optim/gradient_norm_decoder"] == 2 and entry["optim/skipped_steps"] == 1
    assert math.isnan(monitor.means["loss/total"].mean)
    assert monitor.means["loss/quantizer"] == (0.5, 1, 0)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for line in (monitor.folder / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_run_that_resumes_shows_each_step_once_in_both_records(one_rank, run):
    log_steps(run, 1, 5).close()
    path = Monitor(run, step=3).folder / METRICS_FILE  # from the checkpoint of step 3
    log_steps(run, 4, 6).close()
    written, shown = read_curves(path.parent), read_tensorboard(path.parent)
    assert written.curves["loss/total"].steps == [1, 2, 3, 4, 5, 6]
    assert written.curves["loss/perceptual"] == ([2, 4, 6], [2.0, 4.0, 6.0])
    assert written.curves.keys() == shown.curves.keys()
    for name, (steps, values) in written.curves.items():
        assert shown.curves[name].steps == steps, name
        assert shown.curves[name].values == pytest.approx(values, rel=1e-6), name
    assert written.histograms == shown.histograms
    step, counts = written.histograms["codebook/histogram"]
    assert step == 6 and sum(counts) == NUM_CODES and counts[0] == NUM_CODES - 6


def test_entries_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / METRICS_FILE
    lines = [json.dumps({"step": step, "loss/total": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))
    drop_entries_after(tmp_path, 2)
    assert path.read_text().splitlines() == lines[:2]


def test_validation_is_written_with_its_grid(one_rank, run):
    monitor = Monitor(run, step=0)
    images, images_hat = torch.rand(2, 4, 3, 32, 32)
    monitor.log_validation(7, Validation({"validation/psnr": 20.0}, images, images_hat))
    monitor.close()
    assert read_metrics(monitor.folder) == [{"step": 7, "validation/psnr": 20.0}]
    assert (monitor.folder / "samples" / "step_00000007.png").is_file()


def test_the_line_shows_what_matters(one_rank, run, caplog):
    caplog.set_level(logging.INFO, "vqrae_ds.monitoring.monitor")
    log_steps(run, 1, 2).close()
    line = caplog.messages[-1]
    assert line.startswith("step    2/1000  loss 0.5 ")
    for shown in ("lpips 2 ", "used   3.1%", "lr 5.00e-02", "img/s", "a GPU)", "GB", "left"):
        assert shown in line
    assert "skipped" not in line and "MFU" not in line and "D " not in line


def test_the_line_has_skipped_steps_mfu_and_slow_data_where_there_are_any():
    entry = {
        "loss/total": 0.123456,
        "optim/skipped_steps": 3,
        "optim/gradient_norm_generator": 0.51,
        "perf/seconds_per_step": 2.0,
        "perf/data_seconds": 0.5,
        "perf/images_per_second": 512.0,
        "perf/images_per_second_per_gpu": 64.0,
        "perf/tflops_per_gpu": 412.34,
        "perf/mfu": 0.417,
        "perf/peak_memory_gb": 61.26,
    }
    line = log_line(100, 1900, entry)
    assert line == (
        "step  100/1900  loss 0.1235    norm 0.51      3 skipped  512.0 img/s (64.0 a GPU)  "
        "412 TFLOP/s  MFU 41.7%  data 25%  61.3 GB  1:00:00 left"
    )
