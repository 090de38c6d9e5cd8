"""Command lines: a user's mistake is one line on stderr and exit status 2.

Exit status 1 is a failure of the machine, a full disk for example; 130 and 143 are Ctrl-C and the
polite kill, both after what was open has been cleaned up. 141 is an end without a word, where
nobody reads what is printed any more: `head` had enough.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

_STDOUT = 1
_ENDING = (signal.SIGTERM, signal.SIGINT)
PEER_SECONDS = 10.0  # that a rank may be behind its peer, on a machine that is busy
USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)


class OneLineParser(argparse.ArgumentParser):
    """Raises `ValueError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help shows an example)")


def run_tool(main: Callable[[], None]) -> None:
    """Run `main`; what a user or the machine did wrong is one line, and the exit status says which.

    SIGTERM unwinds the stack, as Ctrl-C does, so that no half-written file is left behind.
    """
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> NoReturn:
        signals.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, _unwind), signal.signal(signal.SIGINT, note)
    try:
        main()
        if sys.stdout is not None:  # it was closed from the beginning
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        # A library may make an error of its own of the interruption: safetensors does.
        if signals or isinstance(error, KeyboardInterrupt):
            exit_with(InterruptedError("interrupted"), status=128 + signal.SIGINT)
        if isinstance(error, USER_ERRORS):
            exit_with(error)
        if isinstance(error, BrokenPipeError) and _is_reader_gone():  # not a pipe of our own
            sys.exit(128 + signal.SIGPIPE)
        if isinstance(error, OSError):
            exit_with(error, status=1)
        raise
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
        if _is_reader_gone():  # Python would complain as it writes the rest at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)


def _is_reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def end_process_after(main: Callable[[], None]) -> NoReturn:
    """Run `main` and end the process with its exit status, whatever else still runs in it.

    The threads of a process group may abort an interpreter that winds down when a peer has left,
    and so spoil the status that `main` ended with.
    """
    status = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def configure_logging(rank: int) -> None:
    """What the package says goes to stderr: on rank 0 from INFO on, on its peers errors alone."""
    level = os.environ.get("VQRAE_LOG_LEVEL", "INFO" if rank == 0 else "ERROR")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("vqrae_ds").setLevel(level)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    exit_with(InterruptedError("ended by SIGTERM"), status=128 + number)


def exit_with(error: Exception, *, silent: bool = False, status: int = 2) -> NoReturn:
    """Say what is wrong, unless a peer says the same, and exit with `status`.

    Who is silent waits for the launcher, which ends all ranks after the first: one that left at
    once would have the peer ended before its word.
    """
    if silent:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        signal.sigtimedwait(_ENDING, PEER_SECONDS)
    else:
        sys.stderr.write(f"error: {in_one_line(error)}\n")
    sys.exit(status)


def in_one_line(error: Exception) -> str:
    """The message of an error, that of the worker it happened in if it was passed on by torch."""
    message = str(error).strip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].partition(": ")[2]
    return " ".join(message.split())
