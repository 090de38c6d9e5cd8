"""The clock of the training steps, and the share of the peak."""

from __future__ import annotations

import time

import pytest
import torch

from tests.tiny import make_run, save_initial
from vqrae_ds.monitoring.flops import flops_per_image
from vqrae_ds.monitoring.throughput import RankFigures, Throughput, peak_by_name, peak_memory_gb

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    save_initial(tmp_path / "initial")
    return make_run(tmp_path, 1, monitor={"peak_tflops": 0.5})


def test_pauses_do_not_count_and_waiting_does(run):
    clock = Throughput(run, step=10)
    start = time.monotonic()
    with clock.paused():
        time.sleep(0.5)
    for _ in range(2):
        with clock.waiting_for_data():
            time.sleep(0.1)
    own = clock.of_this_rank(CPU)
    figures = clock.restart(14, own)
    elapsed = time.monotonic() - start
    assert 0.2 <= 4 * figures["perf/seconds_per_step"] <= elapsed - 0.5
    assert 0.2 <= 4 * figures["perf/data_seconds"] <= elapsed - 0.5
    images_per_second = 4 / figures["perf/seconds_per_step"]
    assert figures["perf/images_per_second"] == pytest.approx(images_per_second)
    assert figures["perf/images_per_second_per_gpu"] == pytest.approx(images_per_second / 2)
    tflops = images_per_second / 2 * flops_per_image(run) / 1e12
    assert figures["perf/tflops_per_gpu"] == pytest.approx(tflops)
    assert figures["perf/mfu"] == pytest.approx(tflops / 0.5)
    assert clock.of_this_rank(CPU).data_seconds == 0, "the clock starts anew"


def test_figures_of_the_slowest_rank_are_shown(run):
    figures = Throughput(run, step=0).restart(2, RankFigures(peak_memory_gb=70, data_seconds=3))
    assert figures["perf/peak_memory_gb"] == 70
    assert figures["perf/data_seconds"] == 1.5


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    save_initial(tmp_path / "initial")
    clock = Throughput(make_run(tmp_path, 1), step=0)
    assert "perf/mfu" not in clock.restart(1, RankFigures(1, 0)), "fp32 has no peak here"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_by_name(name) == peak


def test_peak_memory_of_a_process_grows_with_what_it_holds():
    before = peak_memory_gb(CPU)
    assert 0.1 < before < 100
    held = torch.ones(int(1e8))
    assert peak_memory_gb(CPU) > 0.35, "0.4 GB more than an empty process"
    assert held.sum() > 0
