"""What is measured over ranks: two ranks with different images give the figures of all together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.tiny import PlainEngine, build_model, images_of, make_rank_folders, make_run
from vqrae_ds.calibration import calibrate
from vqrae_ds.config import Run
from vqrae_ds.data.stream import Batch, EvaluationBatch
from vqrae_ds.evaluation.metrics import psnr, ssim, validate
from vqrae_ds.evaluation.summary import read_metrics
from vqrae_ds.models.quantizer import Quantizer
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.monitoring.monitor import Monitor
from vqrae_ds.monitoring.profiler import StepProfiler

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor([True, True]), torch.tensor([True, False])
PERPLEXITY = 6 ** (4 / 6) * 3 ** (2 / 6)  # of code 2 with a third, and four with a sixth each


GRADIENT_SQUARES = (  # each rank has its share of the gradient
    {"quantizer": torch.tensor(3.0), "decoder": torch.tensor(1.0)},
    {"quantizer": torch.tensor(6.0), "decoder": torch.tensor(15.0)},
)


class Measures(NamedTuple):
    """What one rank found."""

    validation: dict[str, float]
    entry: dict[str, float]
    means: dict[str, tuple]
    disagreement: str
    statistics: tuple[torch.Tensor, torch.Tensor]  # mean and scale of the features
    codebook: list[tuple]
    window: list[float]


def measure(rank: int, folder: Path) -> None:
    model = TrainingModel(build_model())
    images = images_of(0, rank)
    calibrate(PlainEngine(model), [Batch(images, [])], num_images=4, device=CPU)
    numbers = torch.arange(2) + 2 * rank
    batch = EvaluationBatch(images, TRUE if rank == 0 else FALSE, [], numbers)
    validation = validate(PlainEngine(model), [batch], None, CPU)

    sections = {"output_dir": str(folder / "run"), "profile_steps": [1, 1]}
    run = make_run(folder / f"rank{rank}", 1, run=sections)
    monitor = Monitor(run, step=0)
    monitor.add({"loss/total": torch.tensor(1.0 + rank)})
    monitor.add({"loss/total": torch.tensor(2.0 + rank), "loss/perceptual": torch.tensor(0.5)})
    spoilt = float("nan") if rank == 0 else 3.0  # of a step that is skipped
    monitor.add({"loss/total": torch.tensor(spoilt)})
    monitor.add_gradients(GRADIENT_SQUARES[rank])
    with monitor.waiting_for_data():
        time.sleep(0.3 * rank)
    quantizer = model.vqrae.quantizer
    quantizer.code_counts[2 * rank : 2 * rank + 3] = 5
    of_codes = [quantizer.get_codebook_statistics(over) for over in (None, dist.all_reduce)]
    monitor.window.add_step(quantizer)  # which resets
    of_codes.append(quantizer.get_codebook_statistics(dist.all_reduce))
    largest = {"loss/perceptual": torch.tensor(7.0 - rank)}
    entry = monitor.log(1, 4, {"decoder": 0.1}, {"optim/skipped_steps": 1}, largest)
    means = {name: tuple(mean) for name, mean in monitor.means.items()}
    disagreement = refusal_of_other_terms(monitor, rank)
    monitor.close()
    trace_one_rank(run)
    window = window_of_a_larger_output(folder / f"rank{rank}", quantizer)
    statistics = (model.vqrae.standardize.mean, model.vqrae.standardize.std)
    codebook = [tuple(s) for s in of_codes]
    measures = Measures(
        validation.figures, entry, means, disagreement, statistics, codebook, window
    )
    torch.save(tuple(measures), folder / f"measured{rank}.pt")


def refusal_of_other_terms(monitor: Monitor, rank: int) -> str:
    """What each rank is told where one of them has added another term than its peers."""
    name = "loss/adversarial" if rank else "loss/quantizer"
    monitor.add({name: torch.tensor(1.0), "loss/perceptual": torch.tensor(1.0)})
    with pytest.raises(AssertionError) as refused:
        monitor.log(2, 8, {})
    return str(refused.value)


def trace_one_rank(run: Run) -> None:
    """A profiled step in which the ranks meet."""
    profiler = StepProfiler(run)
    with profiler.step(1):
        dist.all_reduce(torch.ones(3))


def window_of_a_larger_output(folder: Path, quantizer: Quantizer) -> list[float]:
    """How often codes 0, 1, 2 are in the window after a step with each, in this order.

    A step has 4 images of 4 x 4 tokens, each of 16 x 16 pixels out of 8 x 8; the window 128 tokens.
    """
    model = {"output_patch_size": 16, "image_size": 64}
    init = {"model": None, "allow_untrained_encoder": True}
    run = make_run(folder, 1, model=model, init=init, monitor={"usage_window_tokens": 128})
    monitor = Monitor(run, step=0)
    for code in range(3):
        quantizer.reset_codebook_usage()
        quantizer.code_counts[code] = 64
        monitor.window.add_step(quantizer)
    monitor.close()
    return monitor.window.counts()[:3].tolist()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reductions")
    make_rank_folders(folder, 2)
    run_ranks(2, measure, folder)
    found = [torch.load(folder / f"measured{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, [Measures(*measures) for measures in found]


def test_calibration_is_that_of_all_images(measured):
    _, ranks = measured
    model = build_model()
    with torch.no_grad():
        features = model.encode(torch.cat([images_of(0, 0), images_of(0, 1)])).double()
    for rank in ranks:
        mean, std = rank.statistics
        assert torch.allclose(mean.double(), features.mean((0, 1)), atol=1e-6)
        assert torch.allclose(std.double(), features.std((0, 1), correction=0), rtol=1e-5)
        assert torch.equal(mean, ranks[0].statistics[0])
        assert torch.equal(std, ranks[0].statistics[1])


def test_validation_counts_each_image_of_each_rank_once(measured):
    _, ranks = measured
    model = build_model().eval()
    model.standardize.mean, model.standardize.std = ranks[0].statistics
    images = torch.cat([images_of(0, 0), images_of(0, 1)[:1]])
    with torch.no_grad():
        output = model(images)
    used, counts = output.indices_Bhw.unique(return_counts=True)
    share = counts / counts.sum()
    expected = {
        "psnr": psnr(output.reconstruction, images).mean().item(),
        "ssim": ssim(output.reconstruction, images).mean().item(),
        "usage": len(used) / 64,
        "perplexity": (-(share * share.log()).sum()).exp().item(),
        "teacher_cosine": 1,
    }
    for rank in ranks:
        for name, value in expected.items():
            assert rank.validation[f"validation/{name}"] == pytest.approx(value, rel=1e-5), name


def test_logged_figures_are_means_over_ranks_and_micro_batches(measured):
    folder, ranks = measured
    for rank in ranks:
        entry = rank.entry
        assert entry["loss/total"] == pytest.approx((1 + 2 + 2 + 3 + 3) / 5), "without the NaN"
        assert rank.means["loss/total"] == (entry["loss/total"], 5, 1)
        assert rank.means["loss/perceptual"] == (0.5, 2, 0)
        assert entry["optim/nonfinite_terms"] == 1
        assert entry["optim/skipped_steps"] == 1
        assert entry["loss/perceptual_largest"] == 7.0, "of rank 0"
        assert entry["codebook/usage"] == 5 / 64, "codes 0-2 on one rank, 2-4 on the other"
        assert entry["codebook/perplexity"] == pytest.approx(PERPLEXITY)
        assert entry["codebook/dead_codes"] == 59
    (written,) = read_metrics(folder / "run")  # one rank writes
    assert (written["step"], written["loss/total"]) == (1, ranks[0].entry["loss/total"])
    assert written["codebook/histogram"] == [59, 0, 0, 4, 1], "four codes 5 times, one 10 times"


def test_gradient_norms_are_those_of_the_shares_together(measured):
    _, ranks = measured
    for rank in ranks:
        assert rank.entry["optim/gradient_norm_quantizer"] == pytest.approx(3)
        assert rank.entry["optim/gradient_norm_decoder"] == pytest.approx(4)
        assert rank.entry["optim/gradient_norm_generator"] == pytest.approx(5)


def test_the_slowest_rank_is_shown_to_all(measured):
    _, ranks = measured
    for rank in ranks:
        assert rank.entry["perf/data_seconds"] >= 0.3, "rank 0 did not wait"
        assert rank.entry["perf/data_seconds"] == ranks[0].entry["perf/data_seconds"]
        assert rank.entry["perf/peak_memory_gb"] == ranks[0].entry["perf/peak_memory_gb"] > 0.1


def test_ranks_that_add_other_terms_are_told_so_together(measured):
    _, ranks = measured
    for rank, own in zip(ranks, ("loss/quantizer", "loss/adversarial"), strict=True):
        assert rank.disagreement.startswith("ranks [1] differ from rank 0")
        assert own in rank.disagreement


def test_one_rank_writes_a_trace_and_no_other_waits_for_it(measured):
    folder, _ = measured
    names = sorted(path.name for path in (folder / "run" / "profile").iterdir())
    assert names == ["trace_steps_1-1.json.gz", "trace_steps_1-1.txt"]


def test_statistics_of_the_codebook_are_those_of_all_ranks_until_the_reset(measured):
    _, ranks = measured
    for rank in ranks:
        alone, together, after_reset = rank.codebook
        assert alone == pytest.approx((3 / 64, 3, 61))
        assert together == pytest.approx((5 / 64, PERPLEXITY, 59))
        assert after_reset == (0, 0, 64)


def test_the_window_counts_the_tokens_of_the_output(measured):
    _, ranks = measured
    assert [rank.window for rank in ranks] == [[0, 64, 64]] * 2
