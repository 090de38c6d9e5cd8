"""What can be wrong with a sample, by kind; counted over ranks, and a reason to stop above a share.

A sample that cannot be used is refused, and ends the run with its shard and key, or it is skipped:
another one takes its place. Each rank counts its own; the sums come with the reduction of a logged
step, so that all ranks know the same, and stop together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqrae_ds.ranks import gather

logger = logging.getLogger(__name__)

MISSING_SHARD, RESIZED_SHARD, UNREADABLE = "missing_shard", "resized_shard", "unreadable"
EMPTY, TOO_LONG, NOT_AN_IMAGE = "empty", "too_long", "not_an_image"
TOO_LARGE, TOO_MANY_SCANS, CORRUPT = "too_large", "too_many_scans", "corrupt"
REFUSED_MEMBER, DUPLICATE_KEY = "refused_member", "duplicate_key"
CUT_SHARD, DAMAGED_SHARD = "cut_shard", "damaged_shard"
KINDS = (
    MISSING_SHARD,  # the file of the shard is not there
    RESIZED_SHARD,  # it has another size than its index says, or ends inside the sample
    UNREADABLE,  # the disk does not give it
    EMPTY,  # a member of no bytes
    TOO_LONG,  # more bytes than data.max_image_bytes
    NOT_AN_IMAGE,  # neither JPEG nor PNG nor WebP: a web page, a pickle, another format
    TOO_LARGE,  # more pixels than data.max_image_pixels, or too long a side
    TOO_MANY_SCANS,  # a JPEG that takes minutes for each of its pixels
    CORRUPT,  # the decoder finds it cut or damaged
    # Met where there is no index; one is built without them, or not at all.
    REFUSED_MEMBER,  # no image and no companion of one: it may hold code
    DUPLICATE_KEY,  # a second image of its key in the shard
    CUT_SHARD,  # the tar ends too early
    DAMAGED_SHARD,  # no header is where one must be
)
# The share is that of the last samples, this many or more: a few bad ones at the start are no rate.
FEWEST_SAMPLES, MOST_SAMPLES = 1_000, 1_000_000
EXAMPLES = 3  # of a kind that a rank remembers until it has been said


class BadSample(ValueError):
    """A sample that cannot be used; the message says why, `kind` is one of `KINDS`."""

    def __init__(self, message: str, kind: str = CORRUPT) -> None:
        super().__init__(message)
        assert kind in KINDS, kind
        self.kind = kind


class Skipped(NamedTuple):
    """A sample, or a shard, that could not be used; `message` names shard and key."""

    kind: str
    message: str


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
        skipped = {f"data/{kind}": float(count) for kind, count in self.totals.items() if count}
        return {"data/skipped": float(sum(self.totals.values())), **skipped} if skipped else {}

    def agree(self) -> dict[str, int]:
        """What the next start begins with; all ranks call it, and wait for one another."""
        self.learn(torch.tensor(gather(self.counts().tolist()), dtype=torch.float64).sum(0))
        return {kind: count for kind, count in self.totals.items() if count}

    def must_stop(self) -> bool:
        """Whether the share of bad samples is above the configured one; the same on all ranks."""
        return self._recent_bad > self.max_share * max(self._recent_seen, FEWEST_SAMPLES)

    def reason(self) -> str:
        """Why the run stops, for a sentence."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.totals.items() if count)
        return (
            f"{self._recent_bad} of the last {self._recent_seen} samples could not be used, above "
            f"data.max_bad_share = {self.max_share:g} (in the whole run: {kinds})"
        )

    def _log_first(self, kinds: Sequence[str]) -> None:
        """All ranks gather, which only the first sample of a kind costs."""
        everyone: list[dict[str, Any]] = gather({kind: self._examples.get(kind) for kind in kinds})
        for kind in kinds:
            lines = [line for examples in everyone for line in examples[kind] or ()][:EXAMPLES]
            for line in lines:
                logger.warning("skipped, first of its kind (%s): %s", kind, line)
