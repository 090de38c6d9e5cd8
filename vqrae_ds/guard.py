"""Which steps are not taken: those with a loss that is not finite, or that jumped, on any rank.

Between logged steps nothing is reduced and nothing read back for it. A rank that finds a bad loss,
on the device, turns its loss into NaN; DeepSpeed skips a step whose gradient is not finite on all
ranks together, and the guard looks for the culprit only then. The generator steps first: where the
discriminator's own loss is unsound, only the discriminator's step is skipped.

One micro batch of one rank is judged, and with few images in it a healthy one may lie far above the
mean: the squared error of single images spreads over two orders of magnitude. So a jump is one over
the largest healthy micro batch that any rank saw lately, and not over the mean.
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

# Losses whose level is steady enough to know a jump by, with the least level that is assumed: the
# margin of the hinge losses is 1, the others have none. All other terms need only be finite.
WATCHED = {
    "loss/reconstruction": 0.0,
    "loss/perceptual": 0.0,
    "loss/convnext": 0.0,
    "loss/quantizer": 0.0,
    "loss/adversarial": 1.0,
    "gan/discriminator": 1.0,
}
LARGEST = "_largest"  # ends the name under which a logged step has the largest healthy value
# What is left of a level after a logged window. Slow, for a window of few micro batches knows
# little of their spread: a fall of the loss by ten is followed in some twenty windows.
KEPT = 0.9
SKIPPED_SHARE = 0.01  # of a window's steps: more of them are a reason to look
DERIVED = ("loss/total", "gan/adaptive_weight")  # not finite because something else is not
UNLIMITED = torch.finfo(torch.float32).max


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

    `state` is what an earlier start had learned; `tensor_size` neighbours see the same images.
    """

    def __init__(
        self, config: GuardConfig, state: Mapping[str, Any] | None = None, tensor_size: int = 1
    ) -> None:
        self.config, self._tensor_size = config, tensor_size
        state = state or {}
        self.levels: dict[str, float] = dict(state.get("levels", {}))  # of `WATCHED`
        self.skipped_steps: int = state.get("skipped_steps", 0)
        self.skipped_in_a_row = 0
        self.culprits: list[Culprit] = []  # of the last step that was skipped
        self._limits: dict[tuple[str, ...], Tensor] = {}
        self._largest: dict[tuple[str, ...], Tensor] = {}  # of this rank since the last window
        self._taken_in_window, self._skipped_in_window = 0, 0
        self._spiked_in_window = False  # whether a culprit was finite, above its limit
        self._seen: list[tuple[tuple[str, ...], Tensor]] = []  # the terms of the current step

    def judge(self, terms: Mapping[str, Tensor]) -> Tensor:
        """1 where all detached scalars of a micro batch are sound, else NaN: a factor of the loss.

        A term is sound if it is finite and, being one of `WATCHED`, below its limit.
        """
        names = tuple(terms)
        values_T = torch.stack([value.float() for value in terms.values()])
        if names not in self._limits:
            limits = torch.tensor([self.limit(name) for name in names])
            self._limits[names] = limits.to(values_T.device, non_blocking=True)
        self._seen.append((names, values_T))
        is_sound = (values_T.abs() <= self._limits[names]).all()  # no comparison holds for NaN
        healthy_T = torch.where(is_sound, values_T.abs(), 0.0)
        known_T = self._largest.get(names, healthy_T)
        self._largest[names] = torch.maximum(known_T, healthy_T)
        return torch.where(is_sound, 1.0, math.nan)

    def limit(self, name: str) -> float:
        """The largest sound magnitude of a term: none where its level is not known yet."""
        level = max(self.levels.get(name, 0.0), WATCHED.get(name, 0.0))
        if self.config.spike_factor is None or level == 0:
            return UNLIMITED
        return min(self.config.spike_factor * level, UNLIMITED)

    def largest(self) -> dict[str, Tensor]:
        """The largest magnitude of each of `WATCHED` in this rank's sound micro batches.

        Since the last window, on the device; 0 where none was sound. The same names on all ranks.
        """
        found: dict[str, Tensor] = {}
        for names, values_T in self._largest.items():
            for name, value in zip(names, values_T.unbind(), strict=True):
                if name in WATCHED:
                    found[name] = torch.maximum(found.get(name, value), value)
        return found

    def step_taken(self) -> None:
        """All optimizers took the step."""
        self.skipped_in_a_row = 0
        self._taken_in_window += 1
        self._seen.clear()

    def step_skipped(self, step: int) -> None:
        """An optimizer skipped the step, on all ranks; every rank calls it. Names the culprits."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self._skipped_in_window += 1
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
        found = list({(c.rank // self._tensor_size, c.name): c for c in found[::-1]}.values())[::-1]
        self.culprits = [c for c in found if c.name not in DERIVED] or found
        self._spiked_in_window |= any(math.isfinite(c.value) for c in self.culprits)
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
        return {"levels": self.levels, "skipped_steps": self.skipped_steps}

    def learn(self, entry: Mapping[str, float]) -> None:
        """End a window with what was logged of it, the same on every rank.

        `entry` has `largest`, over all ranks, under names that end in `LARGEST`. A level rises at
        once and falls slowly. What was skipped is not in it: a new level that stays, beyond the
        limit, ends the run, and it is for the user to raise `guard.spike_factor`.
        """
        for name in WATCHED:
            new = entry.get(name + LARGEST, 0.0)
            if new > 0:  # else there was no sound micro batch with this term
                self.levels[name] = max(new, KEPT * self.levels.get(name, 0.0))
        skipped, steps = self._skipped_in_window, self._skipped_in_window + self._taken_in_window
        if skipped > max(SKIPPED_SHARE * steps, 1):  # a single one has been warned of
            way_out = ""
            if self._spiked_in_window:
                factor = self.config.spike_factor
                way_out = f": if these losses are healthy, raise guard.spike_factor = {factor}"
            logger.warning("%d of the last %d steps were skipped%s", skipped, steps, way_out)
        self._taken_in_window = self._skipped_in_window = 0
        self._spiked_in_window = False
        self._limits.clear()
        self._largest.clear()
