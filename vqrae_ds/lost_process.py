"""What a rank says when a process that it needs is gone: a peer, or one that reads its data.

Whoever killed it, PyTorch raises a `RuntimeError` in the rank, wherever that is at the moment, and
only its text tells the case from others. Of the transports of a process group gloo's is known here.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator

from vqrae_ds.command_line import exit_with

logger = logging.getLogger(__name__)

# [gloo/transport/tcp/pair.cc:545] Read error [ADDRESS]:PORT: Connection reset by peer. Advice ...
_PEER = re.compile(r"\[\S*gloo/transport/\S+\] (.*?(?:(?:reset|closed) by peer|Broken pipe))")
_WORKER = "DataLoader worker (pid"


class WorkerLost(RuntimeError):
    """A process that reads data has ended before its time; the message names the rank."""


@contextlib.contextmanager
def ending_when_one_is_lost(rank: int) -> Iterator[None]:
    """Inside, the loss of a process ends this one with a line and exit status 1.

    Where it is a peer, that is an entry of the log: the line with `error: ` is the peer's, if it
    could still say one. VQRAE_LOG_LEVEL=DEBUG shows where the rank was. All other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        peer, is_worker = _PEER.match(text), text.startswith(_WORKER)
        if not (peer or is_worker):
            raise
        logger.debug("the loss was found here", exc_info=True)
        if is_worker:
            exit_with(_worker_lost(rank, text), status=1)
        logger.error(
            "rank %d: a peer is gone: %s. If it says nothing itself it was killed; dmesg on its "
            "machine shows whether for want of memory",
            rank,
            peer[1],
        )
        sys.exit(1)


def _worker_lost(rank: int, text: str) -> WorkerLost:
    return WorkerLost(
        f"rank {rank}: a process that reads data has died: {text.removesuffix('.')}. Where it was "
        "killed for want of memory, lower data.num_workers, data.prefetch_batches or "
        "data.max_image_pixels"
    )
