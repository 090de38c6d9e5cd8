"""A conversation with a probe on a node, over ssh, srun or a pipe.

The probe's code goes first over the standard input, so that nothing need be installed on the node;
one line of JSON is a request, one an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from vqrae_ds.launching.probe import MARK

Way = Literal["ssh", "srun", "local"]

CONNECT_SECONDS = 5
ANSWER_SECONDS = 0.7  # for an answer to be written, sent and read
_LONGEST_LINE = 1 << 24
_START = "import json, sys; exec(compile(json.loads(sys.stdin.readline()), 'probe.py', 'exec'))"
_SSH_OPTIONS = ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "LogLevel=ERROR")

# What ssh says on stderr, OpenSSH 9.2, and what it means; the first that fits.
_SSH_FAILURES = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is another than the one in known_hosts: if the machine was set up anew, "
        "`ssh-keygen -R {host}`, else find out who answers there",
    ),
    (
        "Host key verification failed",
        "its host key is not known here: `ssh {host}` once by hand, or add the output of "
        "`ssh-keyscan {host}` to known_hosts",
    ),
    ("Permission denied", "it refuses our key: `ssh-copy-id {host}`; BatchMode asks no password"),
    ("Could not resolve hostname", "its name has no address: see the hostfile, DNS, /etc/hosts"),
    ("Connection refused", "it is there, but nothing listens on the port of ssh: start sshd"),
    ("Connection timed out", "dead or cut off: nothing answered within {connect} s"),
    ("No route to host", "dead or cut off: there is no route to it"),
    ("Network is unreachable", "cut off: its network cannot be reached from here"),
)
_NO_PYTHON = (
    "has no {python} that runs: {said}. Install the environment under the same path on every node, "
    "or share it"
)


class NodeLost(Exception):
    """A node gave no answer; the message says why and what to do."""


def command_for(host: str, way: Way) -> list[str]:
    """The command that starts a probe on `host`, with the Python that the ranks have there."""
    program = [node_python(way), "-u", "-c", _START]
    if way == "local":
        return program
    if way == "srun":
        one_task = ("--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}")
        return ["srun", *one_task, "--overlap", "--quiet", *program]
    options = [word for option in _SSH_OPTIONS for word in ("-o", option)]
    return ["ssh", *options, "--", host, shlex.join(program)]


def node_python(way: Way) -> str:
    """The Python of the nodes: this one, or in a job NODE_PYTHON, which may be in a container."""
    return (os.environ.get("NODE_PYTHON") if way == "srun" else None) or sys.executable


class Connection:
    """A probe that was started on a node. Made by `connect`."""

    def __init__(self, host: str, way: Way, process: asyncio.subprocess.Process) -> None:
        self.host, self._way, self._process = host, way, process
        # Read all along: a full pipe would stop the other side.
        self._errors = asyncio.create_task(process.stderr.read())

    async def ask(self, what: str, seconds: float, **details: Any) -> Any:
        """The answer of the probe's function `what`, which is given `details`.

        Raises `NodeLost` where none comes within `seconds`. The probe gives up somewhat earlier on
        what hangs over there, so that the rest of its answer is in time.
        """
        told = max(0.2, seconds - ANSWER_SECONDS)
        request = {"ask": what, "seconds": told, "details": details}
        try:
            await self._send(request)
            return await asyncio.wait_for(self._answer(), seconds)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            raise NodeLost(await self._explain(seconds)) from error

    async def close(self) -> None:
        """End the conversation; the probe removes what it wrote, and is not waited for long."""
        with contextlib.suppress(ConnectionError):
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 0.5)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._errors.cancel()

    async def _send(self, message: Any) -> None:
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        await self._process.stdin.drain()

    async def _answer(self) -> Any:
        while line := await self._process.stdout.readline():
            if line.startswith(MARK.encode()):
                return json.loads(line[len(MARK) :])
        raise asyncio.IncompleteReadError(b"", None)

    async def _explain(self, seconds: float) -> str:
        """Why no answer came: what the command said, if it has ended."""
        try:
            said = (await asyncio.wait_for(asyncio.shield(self._errors), 0.2)).decode()
            status = await asyncio.wait_for(self._process.wait(), 0.2)
        except asyncio.TimeoutError:
            silent = "SLURM starts nothing there" if self._way == "srun" else "a home folder hangs"
            return (
                f"no answer within {seconds:.1f} s: dead or cut off, {silent}, or under great load"
            )
        return explain_failure(self.host, self._way, status, said)


async def connect(host: str, way: Way, probe: str) -> Connection:
    """Start a probe, the text of `probe.py`, on `host`. Raises `NodeLost` without ssh or srun."""
    command = command_for(host, way)
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LONGEST_LINE
        )
    except OSError as error:
        raise NodeLost(f"{command[0]} cannot be started here: {error.strerror}") from error
    connection = Connection(host, way, process)
    with contextlib.suppress(ConnectionError):  # who asks is told why
        await connection._send(probe)
    return connection


def probe_text() -> str:
    """The code that `connect` sends."""
    return Path(__file__).with_name("probe.py").read_text()


def explain_failure(host: str, way: Way, status: int, said: str) -> str:
    """One line on a connection that ended with `status` and `said` so on stderr."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit status {status}"
    if status in (126, 127):  # of the shell over there
        return _NO_PYTHON.format(python=node_python(way), said=last)
    if way == "ssh" and status == 255:
        for sign, meaning in _SSH_FAILURES:
            if sign in said:
                return meaning.format(host=host, connect=CONNECT_SECONDS)
    return f"{way} ended with status {status}: {last}"
