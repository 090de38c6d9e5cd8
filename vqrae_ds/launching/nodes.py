"""The nodes of a hostfile job, seen from where it was launched: a guardian on each, over ssh."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from vqrae_ds.launching.guardian import END, REPORT

logger = logging.getLogger(__name__)

_ALIVE_SECONDS = 15  # between two of ssh's own questions whether the other side is there


def ssh_options(silence: float = 30.0) -> list[str]:
    """Options of ssh for a connection that must not give up before `silence` seconds are over."""
    count = math.ceil(silence / _ALIVE_SECONDS) + 1
    alive = (f"ServerAliveInterval={_ALIVE_SECONDS}", f"ServerAliveCountMax={count}")
    options = ("BatchMode=yes", "ConnectTimeout=10", *alive)
    return [word for option in options for word in ("-o", option)]


class Node:
    """One guardian. `processes` is how many of the launch it last saw; `None` before its word."""

    def __init__(self, name: str, command: Sequence[str], ssh: Sequence[str]) -> None:
        self.name = name
        self.processes: int | None = None
        self.heard = time.monotonic()
        self.is_over = False  # of its processes there were some, and are none
        self._guardian = subprocess.Popen(
            ["ssh", *ssh, name, shlex.join(command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for the launcher alone
        )
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def is_connected(self) -> bool:
        """Whether its guardian is there."""
        return self._guardian.poll() is None

    def tell(self, word: str) -> None:
        """Write one line to the guardian."""
        with contextlib.suppress(OSError):  # it has ended, which `is_connected` says
            self._guardian.stdin.write(f"{word}\n")

    def leave(self) -> None:
        """Drop the connection."""
        self._guardian.kill()
        self._guardian.wait()
        with contextlib.suppress(OSError):  # a word that did not get through
            self._guardian.stdin.close()

    def _listen(self) -> None:
        for line in self._guardian.stdout:
            if not line.startswith(REPORT):  # a greeting of the login shell
                continue
            count = int(line.removeprefix(REPORT))
            self.is_over = self.is_over or (bool(self.processes) and count == 0)
            self.processes, self.heard = count, time.monotonic()


class Nodes:
    """All nodes of a job. As a context: at its end nothing of the job is left on any of them.

    Raises `ValueError` where a node does not answer at the start.
    """

    def __init__(self, names: Sequence[str], mark: str, orders: Path, silence: float) -> None:
        """`silence`: after so many seconds without a word either side gives the other up."""
        self.silence = silence
        root = Path(__file__).parents[2]
        command = ["env", f"PYTHONPATH={root}", sys.executable, "-m", "vqrae_ds.launching.guardian"]
        command += [mark, str(orders), str(silence)]
        self.all = [Node(name, command, ssh_options(silence)) for name in names]

    def __enter__(self) -> Nodes:
        deadline = time.monotonic() + self.silence
        while silent := [node for node in self.all if node.processes is None]:
            gone = [node.name for node in silent if not node.is_connected]
            if gone or time.monotonic() > deadline:
                for node in self.all:
                    node.leave()
                names = ", ".join(gone or [node.name for node in silent])
                raise ValueError(f"no launch: this does not work: ssh {names} {sys.executable}")
            self._tell("on")  # those that are there wait for the slowest
            time.sleep(0.5)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end()

    def trouble(self) -> str | None:
        """Tell all guardians that the launcher is there, and say which node is lost."""
        self._tell("on")
        now = time.monotonic()
        for node in self.all:
            if not node.is_connected:
                return f"the connection to {node.name} is lost"
            if now - node.heard > self.silence:
                return f"{node.name} has not answered for {self.silence:g} s"
        return None

    def is_any_over(self) -> bool:
        """Whether on some node the job had begun and has ended."""
        return any(node.is_over for node in self.all)

    def is_any_alive(self) -> bool:
        """Whether on some node that answers the job goes on."""
        return any(node.is_connected and node.processes for node in self.all)

    def _tell(self, word: str) -> None:
        for node in self.all:
            node.tell(word)

    def _end(self) -> None:
        """Have all guardians end what is left, and wait for those that answer."""
        self._tell(END)
        deadline = time.monotonic() + 15  # more than a guardian takes
        while any(n.is_connected for n in self.all) and time.monotonic() < deadline:
            time.sleep(0.1)
        for node in self.all:
            if node.processes or node.is_connected:
                logger.error("%s: processes of the job may be left there", node.name)
            node.leave()
