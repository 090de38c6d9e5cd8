"""Training on the nodes of a hostfile: DeepSpeed's launcher over pdsh, watched.

    python -m vqrae_ds.launching.hostfile HOSTFILE CONFIG.yaml DEEPSPEED.json [a.b=value ...]

DeepSpeed's launcher answers a signal by `pkill -f` of every DeepSpeed job of this user on the
nodes. It does not notice that a node is gone, and lets the ranks of one node run on where those of
another have failed. So it runs where no signal reaches it, and a guardian on each node
(`guardian`) ends what must be ended.

Ctrl-C or TERM: the ranks save and leave. Again: they are killed. The job ends by itself where a
node has not answered for VQRAE_SILENCE_SECONDS, or goes on for VQRAE_GRACE_SECONDS after its end on
another node. launchers/multinode.sh sets both.

Exit status: 0 with the marker DONE, 85 with PREEMPTED, 2 a user's mistake, else 1 or that of pdsh.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.launching.doctor import look_before_launch
from vqrae_ds.launching.hosts import Host, port_of_run, read_hostfile, write_hostfile
from vqrae_ds.launching.needs import needs_of
from vqrae_ds.launching.nodes import Nodes, ssh_options
from vqrae_ds.launching.orders import (
    LAUNCH,
    ORDERS,
    Orders,
    forwarded,
    sounds_secret,
    write_deepspeed_env,
    write_orders,
)
from vqrae_ds.launching.owner import this_process
from vqrae_ds.launching.processes import end
from vqrae_ds.launching.run_folder import (
    RunFolder,
    add_trainer_arguments,
    check_run,
    trainer_arguments,
)
from vqrae_ds.stopping import DONE, PREEMPTED, PREEMPTED_STATUS, SIGNALS

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
# DeepSpeed forwards these by itself, quoted in part: `$(...)` in one would be run on the nodes. It
# forwards PYTHON too, and logs all of it: so it gets nothing that sounds like a secret.
FORWARDED_BY_DEEPSPEED = ("MLFLOW", "MV2", "UCX", "NCCL")


def main() -> None:
    """Launch, watch, end."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    parser = OneLineParser(description="Train on the nodes of a hostfile.", allow_abbrev=False)
    parser.add_argument("hostfile", metavar="HOSTFILE", type=Path)
    add_trainer_arguments(parser)
    args = parser.parse_args()
    arguments = trainer_arguments(args.config, args.deepspeed_config, args.others)

    silence, grace = _seconds("VQRAE_SILENCE_SECONDS"), _seconds("VQRAE_GRACE_SECONDS")
    hosts = read_hostfile(args.hostfile)
    if shlex.quote(sys.executable) != sys.executable:
        raise ValueError(f"{sys.executable}: a remote shell would split this path of Python")
    run = check_run(arguments, sum(host.slots for host in hosts))
    folder = RunFolder(Path(run.config.run.output_dir))
    folder.turn_signals_into_stop()
    folder.open(this_process())
    port = int(os.environ.get("MASTER_PORT") or port_of_run(folder.path))
    needs = needs_of(run, Path(args.config), Path(args.deepspeed_config), args.others, port)
    is_sound = look_before_launch(hosts, "ssh", needs)
    if folder.times_asked or not is_sound:
        folder.close()
        sys.exit(PREEMPTED_STATUS if folder.times_asked else 1)
    mark = uuid.uuid4().hex
    orders = _write_files(folder, hosts, arguments, mark)
    names = [host.name for host in hosts]
    with closing(folder), Nodes(names, mark, orders, silence) as nodes:
        # A mark of its own: where this machine is a node too, its guardian counts the ranks alone.
        own_mark = f"{mark}-launcher"
        launcher = _launch(folder, hosts, port, own_mark, ssh_options(silence))
        status = _watch(launcher, nodes, folder, grace)
        end(own_mark)  # each ssh of pdsh has a session of its own, and would wait for a lost node
    marker = folder.marker()
    logger.info("the launcher ended with status %d; marker: %s", status, marker or "none")
    sys.exit(_exit_status(marker, status))


def _seconds(name: str) -> float:
    text = os.environ.get(name, "")
    if not re.fullmatch(r"\d+(\.\d*)?", text) or float(text) == 0:
        raise ValueError(f"{name} = {text!r} is no time in seconds: launchers/multinode.sh sets it")
    return float(text)


def _exit_status(marker: str | None, status: int) -> int:
    """That of the job, by the marker: DeepSpeed's launcher ends with 0 when a signal ended it."""
    if marker == DONE:
        return 0
    if marker == PREEMPTED:
        return PREEMPTED_STATUS
    return status if 0 < status < 128 and status != PREEMPTED_STATUS else 1


def _write_files(folder: RunFolder, hosts: Sequence[Host], arguments: list[str], mark: str) -> Path:
    """The files of this launch; the path of the ranks' orders."""
    environment = forwarded(os.environ, os.environ.get("VQRAE_FORWARD", ""))
    search = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in search)
    path = folder.launch / "orders.json"
    write_orders(path, Orders(os.getcwd(), arguments, environment))
    write_hostfile(folder.launch / "hosts", hosts)
    own = {LAUNCH: mark, ORDERS: str(path)}
    write_deepspeed_env(folder.launch / "deepspeed.env", environment, **own)
    return path


def _launch(
    folder: RunFolder, hosts: Sequence[Host], port: int, mark: str, ssh: Sequence[str]
) -> subprocess.Popen:
    """Start DeepSpeed's launcher; it and all below it are deaf to `SIGNALS`, and have the mark.

    `ssh`: options of it.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(FORWARDED_BY_DEEPSPEED) or sounds_secret(name))
    }
    environment[LAUNCH] = mark
    environment["DS_ENV_FILE"] = str(folder.launch / "deepspeed.env")
    of_the_site = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    environment["PDSH_SSH_ARGS_APPEND"] = f"{shlex.join(ssh)} {of_the_site}"
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += ["--hostfile", str(folder.launch / "hosts"), "--no_ssh_check", "--force_multi"]
    command += ["--master_addr", os.environ.get("MASTER_ADDR") or _address(hosts[0])]
    command += ["--master_port", str(port)]
    command += ["--module", "vqrae_ds.launching.rank"]
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            command,
            env=environment,
            cwd="/",  # DeepSpeed has the remote shell go there, and would not quote it
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _address(host: Host) -> str:
    """The first address of a host, as DeepSpeed takes it."""
    # In a line of its own, the last one: before it the login shell may greet.
    command = ["ssh", *ssh_options(), host.name, "echo && hostname -I"]
    answer = subprocess.run(command, capture_output=True, text=True)
    addresses = ["", *answer.stdout.splitlines()][-1].split()
    if answer.returncode or not addresses:
        raise ValueError(f"{host.name} does not tell its address; set MASTER_ADDR")
    return addresses[0]


def _watch(launcher: subprocess.Popen, nodes: Nodes, folder: RunFolder, grace: float) -> int:
    """Wait until the job is over everywhere, or must be ended; the launcher's exit status."""
    over_since = None
    while reason := _why_to_wait(launcher, nodes):
        trouble = nodes.trouble()
        if folder.times_asked > 1:
            trouble = "asked to stop twice"
        if over_since is None and nodes.is_any_over():
            over_since = time.monotonic()
        if over_since is not None and time.monotonic() - over_since > grace:
            trouble = f"a node ended {grace:g} s ago, and {reason}"
        if trouble:
            logger.error("ending the job: %s", trouble)
            break
        time.sleep(1)
    launcher.kill()  # does nothing where it has ended
    return launcher.wait()


def _why_to_wait(launcher: subprocess.Popen, nodes: Nodes) -> str | None:
    if launcher.poll() is None:
        return "the launcher has not ended"
    if nodes.is_any_alive():
        return "processes are left on another"
    return None


if __name__ == "__main__":
    run_tool(main)
