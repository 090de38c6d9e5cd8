"""Which steps are not taken: those with a loss that is not finite, or that jumped, on any rank.

Nothing is reduced and nothing read back for it. A rank that finds a bad loss, on the device, turns
its loss into NaN; DeepSpeed skips a step whose gradient is not finite on all ranks together, and
the guard looks for the culprit only then. The generator steps first: where the discriminator's own
loss is unsound, only the discriminator's step is skipped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqrae_ds.config import GuardConfig
from vqrae_ds.ranks import gather

logger = logging.getLogger(__name__)

# Losses whose level is steady enough to know a jump by, with the least level that is assumed:
# pixels and LPIPS have none; the margin of the hinge losses is 1.
WATCHED = {
    "loss/reconstruction": 0.0,
    "loss/perceptual": 0.0,
    "loss/adversarial": 1.0,
    "gan/discriminator": 1.0,
}
DERIVED = ("loss/total", "gan/adaptive_weight")  # not finite because something else is not
LARGEST = torch.finfo(torch.float32).max


class Culprit(NamedTuple):
    """A term of one rank that was not finite, or above its limit."""

    rank: int
    name: str
    value: float
    limit: float

    def __str__(self) -> str:
        above = f", above {self.limit:.4g}" if math.isfinite(self.value) else ""
        return f"{self.name} = {self.value:.4g}{above} on rank {self.rank}"


class Guard:
    """Judges losses, and counts the steps that were skipped.

    `state` is what an earlier start had learned.
    """

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.means: dict[str, float] = dict(state["means"]) if state else {}  # of `WATCHED`
        self.skipped_steps: int = state["skipped_steps"] if state else 0
        self.skipped_in_a_row = 0
        self.culprits: list[Culprit] = []  # of the last step that was skipped
        self._limits: dict[tuple[str, ...], Tensor] = {}
        self._seen: list[tuple[tuple[str, ...], Tensor]] = []  # the terms of the current step

    def judge(self, terms: Mapping[str, Tensor]) -> Tensor:
        """1 where all detached scalars of a micro batch are sound, else NaN: a factor of the loss.

        A term is sound if it is finite and, being one of `WATCHED`, below its limit.
        """
        names = tuple(terms)
        values = torch.stack([value.float() for value in terms.values()])
        if names not in self._limits:
            limits = torch.tensor([self.limit(name) for name in names])
            self._limits[names] = limits.to(values.device, non_blocking=True)
        self._seen.append((names, values))
        is_sound = (values.abs() <= self._limits[names]).all()  # no comparison holds for NaN
        return torch.where(is_sound, 1.0, math.nan)

    def limit(self, name: str) -> float:
        """The largest sound magnitude of a term: none where its level is not known yet."""
        level = max(self.means.get(name, 0.0), WATCHED.get(name, 0.0))
        if self.config.spike_factor is None or level == 0:
            return LARGEST
        return min(self.config.spike_factor * level, LARGEST)

    def step_taken(self) -> None:
        """All optimizers took the step."""
        self.skipped_in_a_row = 0
        self._seen.clear()

    def step_skipped(self, step: int) -> None:
        """An optimizer skipped the step, on all ranks; every rank calls it. Names the culprits."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        mine = [
            (name, value, limit)
            for names, values in self._seen
            for name, value, limit in zip(
                names, values.tolist(), map(self.limit, names), strict=True
            )
            if not abs(value) <= limit
        ]
        self._seen.clear()
        found = [Culprit(rank, *each) for rank, terms in enumerate(gather(mine)) for each in terms]
        self.culprits = [c for c in found if c.name not in DERIVED] or found
        logger.warning("step %d was skipped: %s", step, self.reason())

    def reason(self) -> str:
        """Why the last skipped step was, in words."""
        if not self.culprits:
            return "a gradient is not finite, though all losses are"
        more = f" (and {len(self.culprits) - 3} more)" if len(self.culprits) > 3 else ""
        return "; ".join(map(str, self.culprits[:3])) + more

    def must_stop(self) -> bool:
        """Whether too many steps in a row were skipped; the same on every rank."""
        return self.skipped_in_a_row >= self.config.max_skipped_steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can hold it."""
        return {"means": self.means, "skipped_steps": self.skipped_steps}

    def learn(self, entry: Mapping[str, float]) -> None:
        """Take over the means of a logged window, the same on every rank.

        Half the old mean and half the new, which counts for no more than a jump: one outlier does
        not lift the limit for long. A new level that stays is accepted after a few windows, if the
        run has not ended before: then it is for the user to raise `guard.spike_factor`.
        """
        for name in WATCHED.keys() & entry.keys():
            new = abs(entry[name])
            if not math.isfinite(new):
                continue
            old = self.means.get(name, new)
            largest = (self.config.spike_factor or math.inf) * max(old, WATCHED[name])
            self.means[name] = (old + min(new, largest)) / 2
        self._limits.clear()
