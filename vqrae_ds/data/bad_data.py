"""Bad samples that were skipped: counted by kind over ranks, a reason to stop above a share.

Each rank counts its own; the sums come with the reduction of a logged step, so that all ranks know
the same, and stop together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqrae_ds.data.faults import KINDS, Skipped
from vqrae_ds.ranks import gather

logger = logging.getLogger(__name__)

# The share is that of the last samples, this many or more: a few bad ones at the start are no rate.
FEWEST_SAMPLES, MOST_SAMPLES = 1_000, 1_000_000
EXAMPLES = 3  # of a kind that a rank remembers until it has been said


class BadData:
    """Counts samples and those that were skipped, by kind, for all ranks together.

    `state` is what an earlier start had counted. `totals` are those of the run.
    """

    def __init__(
        self,
        max_share: float,
        state: Mapping[str, int] | None = None,
        *,
        sees_its_own: bool = True,
    ) -> None:
        """Where several ranks see the same images, all but one of them do not count."""
        self.max_share, self._counts_its_own = max_share, sees_its_own
        known = state or {}
        self.totals = {kind: int(known.get(kind, 0)) for kind in KINDS}
        self._seen, self._counts = 0, dict.fromkeys(KINDS, 0)  # of this rank since the last `learn`
        self._examples: dict[str, list[str]] = {}
        self._recent_seen = self._recent_bad = 0
        self._judged_seen = self._judged_bad = 0  # as the last `learn` left them

    def add(self, num_samples: int, skipped: Sequence[Skipped]) -> None:
        """Count a batch of this rank."""
        if not self._counts_its_own:
            return
        self._seen += num_samples
        for kind, message in skipped:
            self._counts[kind] += 1
            examples = self._examples.setdefault(kind, [])
            if len(examples) < EXAMPLES and not self.totals[kind]:
                examples.append(message)

    def counts(self) -> Tensor:
        """(1 + kinds,) float64, of this rank since the last `learn`, to be summed over ranks."""
        return torch.tensor([self._seen, *self._counts.values()], dtype=torch.float64)

    def learn(self, sums: Tensor) -> dict[str, float]:
        """Take over the sums over all ranks of `counts`; every rank calls it with the same.

        The first samples of a kind are logged. Returns the totals of the run as metrics.
        """
        self._take(sums)
        self._judged_seen, self._judged_bad = self._recent_seen, self._recent_bad
        skipped = {f"data/{kind}": float(count) for kind, count in self.totals.items() if count}
        return {"data/skipped": float(sum(self.totals.values())), **skipped} if skipped else {}

    def agree(self) -> dict[str, int]:
        """What the next start begins with; all ranks call it, and wait for one another.

        It is no moment to stop: `must_stop` waits for the next `learn`.
        """
        self._take(torch.tensor(gather(self.counts().tolist()), dtype=torch.float64).sum(0))
        return {kind: count for kind, count in self.totals.items() if count}

    def must_stop(self) -> bool:
        """Whether the share of bad samples is above the configured one; the same on all ranks."""
        return self._judged_bad > self.max_share * max(self._judged_seen, FEWEST_SAMPLES)

    def reason(self) -> str:
        """Why the run stops, for a sentence."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.totals.items() if count)
        return (
            f"{self._judged_bad} of the last {self._judged_seen} samples could not be used, above "
            f"data.max_bad_share = {self.max_share:g} (in the whole run: {kinds})"
        )

    def _take(self, sums: Tensor) -> None:
        seen, *counts = (round(value) for value in sums.tolist())
        found = {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}
        if new := [kind for kind in found if not self.totals[kind]]:
            self._log_first(new)
        for kind, count in found.items():
            self.totals[kind] += count
        self._recent_seen += seen
        self._recent_bad += sum(found.values())
        if self._recent_seen > MOST_SAMPLES:
            self._recent_seen //= 2
            self._recent_bad //= 2
        self._seen, self._counts = 0, dict.fromkeys(KINDS, 0)
        self._examples.clear()

    def _log_first(self, kinds: Sequence[str]) -> None:
        """All ranks gather, which only the first sample of a kind costs."""
        everyone: list[dict[str, Any]] = gather({kind: self._examples.get(kind) for kind in kinds})
        for kind in kinds:
            lines = [line for examples in everyone for line in examples[kind] or ()][:EXAMPLES]
            for line in lines:
                logger.warning("skipped, first of its kind (%s): %s", kind, line)
