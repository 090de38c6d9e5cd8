"""What a run shows: a line with the time left, `metrics.jsonl`, TensorBoard, and image grids.

Between logged steps nothing is reduced and nothing is read back from the device. A logged step has
one fused reduction: the terms since the last one and the largest of them, the norms of the
gradients, how often each code was used, the samples that were skipped, and what each rank measures
for itself.

Names are in groups: loss, codebook, gan, optim, data, perf, checkpoint, retention, validation.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds.config import Run
from vqrae_ds.data.bad_data import BadData
from vqrae_ds.evaluation.metrics import Validation
from vqrae_ds.evaluation.report import error_map, image_grid, save_grid
from vqrae_ds.guard import LARGEST
from vqrae_ds.models.quantizer import Quantizer, codebook_statistics
from vqrae_ds.monitoring.log_line import log_line
from vqrae_ds.monitoring.run_log import RunLog
from vqrae_ds.monitoring.term_sums import TermMean, TermSums, sum_over_ranks
from vqrae_ds.monitoring.throughput import RankFigures, Throughput

logger = logging.getLogger(__name__)

# Of the vectors in the reduction, beside the terms.
CODES, GRADIENT, BAD_DATA = "codes", "gradient_", "bad data"


class CodeWindow:
    """How often each code was used by this rank over the last steps, those that hold `tokens`.

    The counts of each step are kept, on the device, so that the window ends on the very step.
    """

    def __init__(self, tokens: int, tokens_per_step: int) -> None:
        self._counts_K: deque[Tensor] = deque(maxlen=-(-tokens // tokens_per_step))

    def add_step(self, quantizer: Quantizer) -> None:
        """Take over the counts of one step; those of the oldest fall out at the other end."""
        self._counts_K.append(quantizer.code_counts.clone())
        quantizer.reset_codebook_usage()

    def counts(self) -> Tensor:
        """(K,) float64: how often each code was used in the window."""
        return torch.stack(tuple(self._counts_K)).sum(0).double()


class Monitor:
    """Collects terms on every rank, writes on rank 0.

    What an earlier start logged after `step` is dropped: those steps come again.

    `means` are those of the last logged step, by name, each with the number of finite values.
    """

    def __init__(self, run: Run, step: int, bad_data: BadData | None = None) -> None:
        config = run.config
        self._bad_data = bad_data or BadData(config.data.max_bad_share)
        self.run, self.folder = run, Path(config.run.output_dir)
        tokens_a_step = run.schedule.batch.global_batch * config.model.grid_side**2
        self.window = CodeWindow(config.monitor.usage_window_tokens, tokens_a_step)
        self.means: dict[str, TermMean] = {}
        self._terms, self._gradients = TermSums(), {}
        self._throughput = Throughput(run, step)
        self._log = RunLog(self.folder, step) if dist.get_rank() == 0 else None

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the detached terms of one micro batch; they stay on the device.

        All ranks add the same names. Values that are not finite are counted out.
        """
        self._terms.add(terms)

    def add_gradients(self, squares: Mapping[str, Tensor]) -> None:
        """Take this rank's sums of squares by part of the generator, before a logged step.

        Over the ranks they add up to those of the whole gradient: each has its own share.
        """
        self._gradients = {part: square.detach() for part, square in squares.items()}

    def log(
        self,
        step: int,
        samples: int,
        learning_rates: Mapping[str, float],
        numbers: Mapping[str, float] | None = None,
        largest: Mapping[str, Tensor] | None = None,
    ) -> dict[str, float]:
        """Reduce, reset and write what was added since the last call; every rank calls it.

        `numbers` are host values by name, the same on every rank; `largest` are values of this
        rank, of which the entry has the maximum over ranks, under names that end in
        `guard.LARGEST`. The entry is the same on all ranks. What is not finite is not in it, and
        is counted in `optim/nonfinite_terms`.
        """
        largest = dict(largest or {})
        counts_K = self.window.counts()
        if dist.get_rank() % self.run.schedule.batch.tensor_size:  # counted by the group's first
            counts_K.zero_()
        vectors = self._terms.vectors() | {CODES: counts_K}
        vectors |= {GRADIENT + part: s.reshape(1) for part, s in self._gradients.items()}
        vectors[BAD_DATA] = self._bad_data.counts().to(counts_K.device)
        own = self._throughput.of_this_rank(counts_K.device)
        sums, own_WN = sum_over_ranks(vectors, [*own, *largest.values()])
        worst = own_WN.amax(0).tolist()
        self.means = self._terms.means(sums)
        norms = _gradient_norms({part: sums[GRADIENT + part] for part in self._gradients})
        entry = _finite(self.means, norms | dict(numbers or {}))
        maxima = zip(largest, worst[len(own) :], strict=True)
        entry |= {name + LARGEST: value for name, value in maxima}
        entry |= self._bad_data.learn(sums[BAD_DATA])
        codes = codebook_statistics(sums[CODES])._asdict()
        entry |= {f"codebook/{name}": value for name, value in codes.items()}
        entry |= {f"optim/learning_rate_{part}": rate for part, rate in learning_rates.items()}
        entry |= self._throughput.restart(step, RankFigures(*worst[: len(own)]))
        self._terms.clear()
        self._gradients = {}
        if self._log is not None:
            histogram = {"codebook/histogram": usage_histogram(sums[CODES])}
            self._log.write(step, {"samples": samples, **entry, **histogram})
        logger.info(log_line(step, self.run.schedule.total_steps, entry))
        return entry

    def paused(self) -> AbstractContextManager[None]:
        """What happens inside does not count as training time."""
        return self._throughput.paused()

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """What happens inside is training time that the data costs."""
        return self._throughput.waiting_for_data()

    def log_validation(self, step: int, validation: Validation) -> None:
        """Write the figures and the grid original | reconstruction | error."""
        if self._log is not None:
            self._log.write(step, validation.figures)
            images, images_hat = validation.images_B3HW, validation.images_hat_B3HW
            grid_3HW = image_grid([images, images_hat, error_map(images_hat, images)])
            self._log.write_image("validation/reconstructions", grid_3HW, step)
            try:
                save_grid(grid_3HW, self.folder / "samples" / f"step_{step:08d}.png")
            except OSError as error:  # a full disk is no reason for a run to end
                logger.warning("the image grid of step %d was not written: %s", step, error)
        figures = "  ".join(f"{k.split('/')[1]} {v:.4g}" for k, v in validation.figures.items())
        logger.info("validation after step %d: %s", step, figures)

    def close(self) -> None:
        """Write what TensorBoard holds back."""
        if self._log is not None:
            self._log.close()


def usage_histogram(counts_K: Tensor) -> list[int]:
    """How many codes were used 0 times, once, 2-3 times, 4-7 times, ..., up to the most used."""
    _, bucket_K = torch.frexp(counts_K.double())  # n = m * 2^bucket with m in [0.5, 1); 0 for 0
    return torch.bincount(bucket_K.long()).tolist()


def _finite(means: Mapping[str, TermMean], others: Mapping[str, float]) -> dict[str, float]:
    """All values that are finite, and how many were not, if any."""
    values = {name: mean.mean for name, mean in means.items() if mean.count} | others
    num_nonfinite = sum(mean.num_nonfinite for mean in means.values())
    num_nonfinite += sum(not math.isfinite(value) for value in values.values())
    entry = {name: value for name, value in values.items() if math.isfinite(value)}
    return entry | ({"optim/nonfinite_terms": num_nonfinite} if num_nonfinite else {})


def _gradient_norms(squares: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each part's gradient and of all together, from sums of squares over all ranks."""
    if not squares:
        return {}
    norms = {f"optim/gradient_norm_{part}": square.sqrt() for part, square in squares.items()}
    norms["optim/gradient_norm_generator"] = torch.stack(tuple(squares.values())).sum().sqrt()
    return {name: norm.item() for name, norm in norms.items()}
