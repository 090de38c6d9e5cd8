"""What is measured over ranks: two ranks with different images give the figures of all together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.tiny import PlainEngine, build_model, images_of, make_run, save_initial
from vqrae_ds.calibration import calibrate
from vqrae_ds.data.stream import Batch, EvaluationBatch
from vqrae_ds.evaluation.metrics import psnr, validate
from vqrae_ds.evaluation.summary import read_metrics
from vqrae_ds.models.quantizer import Quantizer
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.monitor import Monitor

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor([True, True]), torch.tensor([True, False])
PERPLEXITY = 6 ** (4 / 6) * 3 ** (2 / 6)  # of code 2 with a third, and four with a sixth each


def measure(rank: int, folder: Path) -> None:
    model = TrainingModel(build_model())
    images = images_of(0, rank)
    calibrate(PlainEngine(model), [Batch(images, [])], num_images=4, device=CPU)
    batch = EvaluationBatch(images, TRUE if rank == 0 else FALSE, [])
    validation = validate(PlainEngine(model), [batch], None, CPU)

    run = make_run(folder / f"rank{rank}", 1, run={"output_dir": str(folder / "run")})
    monitor = Monitor(run, step=0)
    monitor.add({"loss/total": torch.tensor(1.0 + rank)})
    monitor.add({"loss/total": torch.tensor(2.0 + rank), "loss/perceptual": torch.tensor(0.5)})
    quantizer = model.vqrae.quantizer
    quantizer.code_counts[2 * rank : 2 * rank + 3] = 5
    of_codes = [quantizer.get_codebook_statistics(over) for over in (None, dist.all_reduce)]
    monitor.window.add_step(quantizer)  # which resets
    of_codes.append(quantizer.get_codebook_statistics(dist.all_reduce))
    entry = monitor.log(1, 4, {"decoder": 0.1})
    monitor.close()
    window = window_of_a_larger_output(folder / f"rank{rank}", quantizer)
    statistics = (model.vqrae.standardize.mean, model.vqrae.standardize.std)
    codebook = [tuple(s) for s in of_codes]
    measures = (validation.figures, entry, *statistics, codebook, window)
    torch.save(measures, folder / f"measured{rank}.pt")


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
    for rank in range(2):
        (folder / f"rank{rank}").mkdir()
        save_initial(folder / f"rank{rank}" / "initial")
    run_ranks(2, measure, folder)
    ranks = [torch.load(folder / f"measured{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, ranks


def test_calibration_is_that_of_all_images(measured):
    _, ranks = measured
    model = build_model()
    with torch.no_grad():
        features = model.encode(torch.cat([images_of(0, 0), images_of(0, 1)])).double()
    for _, _, mean, std, *_ in ranks:
        assert torch.allclose(mean.double(), features.mean((0, 1)), atol=1e-6)
        assert torch.allclose(std.double(), features.std((0, 1), correction=0), rtol=1e-5)
    assert torch.equal(ranks[0][2], ranks[1][2]) and torch.equal(ranks[0][3], ranks[1][3])


def test_validation_counts_each_image_of_each_rank_once(measured):
    _, ranks = measured
    model = build_model().eval()
    model.standardize.mean, model.standardize.std = ranks[0][2:4]
    images = torch.cat([images_of(0, 0), images_of(0, 1)[:1]])
    with torch.no_grad():
        expected = psnr(model(images).reconstruction, images).mean().item()
    for figures, *_ in ranks:
        assert figures["validation/psnr"] == pytest.approx(expected, rel=1e-6)


def test_logged_figures_are_means_over_ranks_and_micro_batches(measured):
    folder, ranks = measured
    for _, entry, *_ in ranks:
        assert entry["loss/total"] == pytest.approx((1 + 2 + 2 + 3) / 4)
        assert entry["loss/perceptual"] == 0.5
        assert entry["codebook/usage"] == 5 / 64, "codes 0-2 on one rank, 2-4 on the other"
        assert entry["codebook/perplexity"] == pytest.approx(PERPLEXITY)
        assert entry["codebook/dead_codes"] == 59
    written = read_metrics(folder / "run")
    assert [(e["step"], e["loss/total"]) for e in written] == [(1, 2.0)], "one rank writes"


def test_statistics_of_the_codebook_are_those_of_all_ranks_until_the_reset(measured):
    _, ranks = measured
    for *_, (alone, together, after_reset), _ in ranks:
        assert alone == pytest.approx((3 / 64, 3, 61))
        assert together == pytest.approx((5 / 64, PERPLEXITY, 59))
        assert after_reset == (0, 0, 64)


def test_the_window_counts_the_tokens_of_the_output(measured):
    _, ranks = measured
    assert [window for *_, window in ranks] == [[0, 64, 64]] * 2
