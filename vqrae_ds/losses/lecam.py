"""LeCam regularisation of the discriminator, and the averages over all ranks that it needs.

Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data" (arXiv:2104.03310),
with the one-sided distances of its code (github.com/google/lecam-gan, biggan_cifar/losses.py) and
the decay of github.com/bytedance/1d-tokenizer (modeling/modules/losses.py). The latter compares the
mean logits of a rank's batch instead of each logit, which depends on how images are spread over
ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqrae_ds.models.discriminator import LogitAverages


class LeCam:
    """The term, and its averages: those over all ranks and micro batches of the steps before.

    The mean logits of a step wait here until the next step, whose first small reduction over ranks
    takes them along: `waiting`, then `take_in`. Nothing may wait when a checkpoint is written,
    because only `averages` is in it. In the first step there is no average and the term is 0.
    """

    def __init__(self, averages: LogitAverages) -> None:
        self.averages = averages
        self.forget()

    def term(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """How far logits lie beyond the average of the other side, squared, mean over logits."""
        real_mean, fake_mean = self.averages.means_2
        beyond_fake = F.relu(real_logits - fake_mean).square().mean()
        beyond_real = F.relu(real_mean - fake_logits).square().mean()
        return self.averages.started * (beyond_fake + beyond_real)

    def add(self, real_logits: Tensor, fake_logits: Tensor, step: int) -> None:
        """Remember the logits of a micro batch of `step`."""
        assert self._step in (None, step), f"the logits of step {self._step} still wait"
        means_2 = torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()])
        self._sum_2 = means_2 if self._sum_2 is None else self._sum_2 + means_2
        self._num_batches, self._step = self._num_batches + 1, step

    def waiting(self, step: int | None) -> Tensor | None:
        """This rank's mean logits (real, fake) of a step before `step` (None: of any), if any wait.

        None on one rank is None on all.
        """
        if self._step is None or self._step == step:
            return None
        return self._sum_2 / self._num_batches

    def take_in(self, means_2: Tensor) -> None:
        """Move the averages by what waited, reduced to its mean over ranks."""
        self.averages.update(means_2)
        self.forget()

    def forget(self) -> None:
        """Drop what waits."""
        self._sum_2: Tensor | None = None
        self._num_batches, self._step = 0, None
