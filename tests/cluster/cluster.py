"""A small cluster with real daemons (`minicluster.sh`): what a test does with it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.conftest import ROOT

T = TypeVar("T")

SCRIPT = Path(__file__).with_name("minicluster.sh")
CONTROLLER = "ctl"
BUSY_SECONDS = 240  # that a step of a test may take on a machine that is busy
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def why_not() -> str | None:
    """Why no cluster can come up on this machine; `None` where one can."""
    checked = subprocess.run(
        [SCRIPT, "check"], env={**os.environ, "MC_DIR": "/tmp"}, capture_output=True, text=True
    )
    return checked.stdout.strip() if checked.returncode else None


def wait_until(what: str, seconds: float, look: Callable[[], T | None], pause: float = 0.2) -> T:
    """The first answer of `look` that is true; `AssertionError` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(pause)
    return answer


class MiniCluster:
    """Nodes n1, n2, ... and `ctl`, from which jobs are submitted. To be used as a context."""

    def __init__(self, folder: Path, nodes: int = 2, **settings: str) -> None:
        """`settings` are those of the script: MC_GRACE="5", for example."""
        self.folder = Path(folder)
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._environment = {**os.environ, **settings, "MC_DIR": str(self.folder)}

    def __enter__(self) -> MiniCluster:
        self._script("up", str(len(self.nodes)))
        return self

    def __exit__(self, *_: object) -> None:
        self._script("down")

    def start(
        self,
        node: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        **options: Any,
    ) -> subprocess.Popen:
        """Start a command on a node; `options` are those of `subprocess.Popen`."""
        environment = {**self._environment, **(env or {})}
        words = [str(word) for word in (SCRIPT, "exec", node, *command)]
        return subprocess.Popen(words, env=environment, cwd=cwd, text=True, **options)

    def run(
        self, node: str, *command: str | Path, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node to its end, its output in the result; no status is refused."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(node, command, **pipes, **options) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def ask(self, node: str, *command: str | Path) -> str:
        """What a command prints on a node, which must end with status 0."""
        done = self.run(node, *command)
        assert done.returncode == 0, f"{shlex.join(map(str, command))}: {done.stderr}"
        return done.stdout

    def submit(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> str:
        """`sbatch` with these arguments, from `ctl`; the number of the job."""
        done = self.run(CONTROLLER, "sbatch", "--parsable", *arguments, env=env, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ExitCode, Reason, BatchHost, ..."""
        text = self.ask(CONTROLLER, "scontrol", "show", "job", number, "--oneliner")
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for_job(self, number: str, *states: str, seconds: float) -> dict[str, str]:
        """The job, as soon as it is in one of the states; without any: as soon as it has ended.

        `AssertionError` after so many seconds, or if it has ended in another state.
        """
        states, deadline = states or ENDED, time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert job["JobState"] not in ENDED, f"job {number} ended: {job}"
            assert time.monotonic() < deadline, f"{seconds:g} s, and job {number} is still: {job}"
            time.sleep(0.3)
        return job

    def processes(self, node: str, text: str) -> dict[int, str]:
        """Command lines by pid of the processes on a node that have `text` in theirs."""
        listed = self.ask(node, "ps", "-eo", "pid=,stat=,args=", "-ww").splitlines()
        found = {}
        for line in listed:
            pid, state, words = line.split(maxsplit=2)
            if text in words and not state.startswith("Z"):
                found[int(pid)] = words
        return found

    def node_down(self, node: str) -> None:
        """The node is lost: its processes die, its network goes."""
        self._script("node-down", node)

    def node_up(self, node: str) -> None:
        """The node is back, as after a reboot; returns when it answers."""
        self._script("node-up", node)
        self.wait_for_node(node)

    def cut_off(self, node: str) -> None:
        """The node's link goes down; its processes live on, and no peer is told."""
        self._script("cut-off", node)

    def reconnect(self, node: str) -> None:
        """The node's link is back; returns when it answers."""
        self._script("reconnect", node)
        self.wait_for_node(node)

    def wait_for_node(self, node: str, seconds: float = 60) -> None:
        """Wait until the node answers. SLURM may notice that later; its jobs wait for it."""
        command = ("ssh", "-o", "ConnectTimeout=2", node, "true")
        wait_until(node, seconds, lambda: self.run(CONTROLLER, *command).returncode == 0)

    def logs(self, lines: int = 30) -> str:
        """The ends of the daemons' logs, for the message of a failure."""
        parts = []
        for path in sorted((self.folder / "log").iterdir()):
            end = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"== {path.name}", *end]))
        return "\n".join(parts)

    def _script(self, *arguments: str) -> None:
        log = self.folder.with_name(self.folder.name + ".out")  # daemons would hold a pipe open
        with open(log, "a") as output:
            done = subprocess.run(
                [SCRIPT, *arguments],
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
        assert done.returncode == 0, log.read_text()[-4000:]
