"""Ends a run before its last step, with a checkpoint, where a signal or a file asks for it.

A handler only notes the signal. Whether to stop is agreed upon by all ranks, for one that left
alone would leave its peers waiting: each small reduction of a step carries the wishes along. The
outcome counts at the end of the next step. On a GPU it is there by then: only a host that is a
whole step ahead of its device has to wait for it, and DeepSpeed's own steps let no host be.

How a run ends, and what it leaves in its folder for a batch script, to which no exit status of a
rank may get through:

    exit status   marker       the run
    0             DONE         has taken its last step
    85            PREEMPTED    was asked to stop; the same command goes on from its checkpoint
    1             none         failed: numbers stayed bad, a peer or a disk was lost
    2             none         was not begun, for a mistake in what it was given, or met an image
                               that cannot be read
    3             none         stood still (`watchdog`)
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

PREEMPTED_STATUS = 85
STOP, DONE, PREEMPTED = "STOP", "DONE", "PREEMPTED"  # files in the run's folder
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def hold_signals() -> None:
    """From here on `SIGNALS` wait until `StopRequest.catch_signals`.

    They pass over the processes that are started meanwhile, too: what SLURM sends to all processes
    of a job would else end a compiler of DeepSpeed's ops, and with it the rank. Only the main
    thread may call it, before there are others.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class StopRequest:
    """Whether this process was asked to stop: by a signal, or by the file `STOP`.

    The file is for those who can reach no rank, a batch script for example. It is removed when it
    was obeyed.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = Path(run_folder)
        self.signal: int | None = None

    def catch_signals(self) -> None:
        """From here on `SIGNALS` are noted, and end the process no more; a second one is as well.

        One that was sent before arrives now, where they were held (`hold_signals`), be it by the
        launcher (`launching.node`). Only the main thread may call it.
        """
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def is_made(self, *, look_for_file: bool) -> bool:
        """Whether there is a reason to stop; one rank is enough to look for the file.

        Where the file system has no answer the file is not there.
        """
        return self.signal is not None or (look_for_file and os.path.exists(self.folder / STOP))

    def clear_marks(self) -> None:
        """Remove the markers of an earlier start."""
        for name in (DONE, PREEMPTED):
            (self.folder / name).unlink(missing_ok=True)

    def leave_mark(self, *, is_done: bool) -> None:
        """Mark the run as done, or else as one that was asked to stop and has obeyed.

        A disk that takes no mark makes a warning: the run has ended well, and its peers wait.
        """
        name = DONE if is_done else PREEMPTED
        try:
            (self.folder / STOP).unlink(missing_ok=True)  # the next start is asked for nothing
            (self.folder / name).touch()
        except OSError as error:
            logger.warning("a batch script will take this run for failed: no %s: %s", name, error)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number


class StopVote:
    """The ranks' agreement to stop, at the price of a fifth number in a reduction of four.

    Where a step has reduced nothing else, a reduction of its own runs beside the next step; on CPUs
    it is waited for at the end of that one.
    """

    def __init__(self, request: StopRequest, rank: int, device: torch.device) -> None:
        import torch

        self.request = request
        self._rank, self._device = rank, device
        self._votes_1: Tensor | None = None  # of this step, where a reduction took them along
        self._host_1 = torch.empty(1, pin_memory=device.type == "cuda")
        self._on_host_1 = self._host_1.numpy()  # to be read without asking the device
        self._arrive: Callable[[], Any] | None = None  # brings the votes of the step before there

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """The mean of a small fp32 vector over all ranks; the wishes to stop go along."""
        import torch

        from vqrae_ds import engines

        reduced = engines.mean_over_ranks(torch.cat([values, self._own_vote()]))
        self._votes_1 = reduced[-1:]
        return reduced[:-1]

    def at_once(self) -> bool:
        """Whether any rank wants to stop now; all ranks call it, and wait for one another."""
        from vqrae_ds import engines

        return engines.mean_over_ranks(self._own_vote()).item() > 0

    def count(self) -> bool:
        """Whether any rank wanted to stop when the step before this one ended.

        All ranks call it at the end of every step.
        """
        is_agreed = False
        if self._arrive is not None:
            self._arrive()
            is_agreed = bool(self._on_host_1[0] > 0)
        self._arrive, self._votes_1 = self._send(), None
        return is_agreed

    def _own_vote(self) -> Tensor:
        import torch

        is_made = self.request.is_made(look_for_file=self._rank == 0)
        # Filled on the device: a copy from the host would wait for it.
        return torch.full((1,), float(is_made), device=self._device)

    def _send(self) -> Callable[[], Any]:
        """Put the votes on their way to the host; what is returned waits until they are there."""
        import torch
        import torch.distributed as dist

        votes_1, work = self._votes_1, None
        if votes_1 is None:
            votes_1 = self._own_vote()
            work = dist.all_reduce(votes_1, async_op=True)

        def copy() -> None:
            if work is not None:
                work.wait()  # on a GPU the stream waits, not the host
            self._host_1.copy_(votes_1, non_blocking=True)

        if not votes_1.is_cuda:
            return copy
        copy()
        arrived = torch.cuda.Event()
        arrived.record()
        return arrived.synchronize
