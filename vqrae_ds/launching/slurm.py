"""What a batch job of SLURM does: check, train on its nodes, and go back into the queue.

    python -m vqrae_ds.launching.slurm CONFIG.yaml DEEPSPEED.json [a.b=value ...]

It is the batch shell's last command (launchers/slurm.sbatch), so that SLURM's signals to the batch
shell arrive here. They become the file STOP in the run's folder. The ranks save and mark the run
as PREEMPTED; then the job is requeued, and its next start goes on from the checkpoint.

Exit status: 0 only where the marker DONE is there; 85 where a run that was stopped cannot be
requeued; 2 a user's mistake; else 1 or srun's. No other status says how a run ended: srun and
DeepSpeed's launcher pass on that of a rank sometimes, or 143, or 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.launching.hosts import Host, port_of, write_hostfile
from vqrae_ds.launching.run_folder import RunFolder, check_run, trainer_arguments
from vqrae_ds.stopping import DONE, PREEMPTED, PREEMPTED_STATUS, SIGNALS

logger = logging.getLogger(__name__)

REQUEUE_SECONDS = 120  # in which SLURM must have ended a job that it requeues


def main() -> None:
    """Run the job of this allocation to its end."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    parser = OneLineParser(description="Train in this allocation of SLURM.", allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("deepspeed_config", metavar="DEEPSPEED.json")
    parser.add_argument("others", nargs=argparse.REMAINDER, metavar="a.b=value")
    args = parser.parse_args()
    arguments = trainer_arguments(args.config, args.deepspeed_config, args.others)

    hosts = hosts_of_job()
    run = check_run(arguments, sum(host.slots for host in hosts))
    folder = RunFolder(Path(run.config.run.output_dir))
    folder.turn_signals_into_stop()
    folder.open()
    job = int(_of_slurm("SLURM_JOB_ID"))
    logger.info(
        "job %d, start %s, on %s: %s",
        *(job, os.environ.get("SLURM_RESTART_COUNT", "0")),
        *(" ".join(host.name for host in hosts), folder.path),
    )
    command = _srun(hosts, folder, port_of_job(job), arguments)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as srun:
        status = srun.wait()
    sys.exit(_end(folder, job, status))


def port_of_job(job: int) -> int:
    """A port for the ranks' rendezvous, so that jobs that share a node seldom share it."""
    return port_of(job)


def hosts_of_job() -> list[Host]:
    """The nodes of this allocation, and the ranks on each, RANKS_PER_NODE or its GPUs.

    Raises `ValueError` outside an allocation, and where the number of ranks is not known.
    """
    slots = os.environ.get("RANKS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or ""
    if not slots.isdecimal() or int(slots) == 0:
        raise ValueError(
            f"{slots!r} is not a number of ranks: set RANKS_PER_NODE, or ask SLURM for GPUs"
        )
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", _of_slurm("SLURM_JOB_NODELIST")],
        check=True,
        capture_output=True,
        text=True,
    )
    return [Host(name, int(slots)) for name in nodes.stdout.split()]


def _end(folder: RunFolder, job: int, status: int) -> int:
    """The exit status of the job, by the marker; a job that was stopped is requeued."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # nothing more to ask the ranks for
    marker = folder.marker()
    logger.info("srun ended with status %d; marker: %s", status, marker or "none")
    if marker == DONE:
        return 0
    if marker != PREEMPTED:
        return status if 0 < status < 128 and status != PREEMPTED_STATUS else 1
    state = _state_of(job)
    if state != "RUNNING":
        # SLURM has ended the job: it was cancelled, and would come back if it were asked for. Or
        # SLURM has put it into the queue itself.
        logger.info("not requeued from here: SLURM calls the job %s", state)
        return PREEMPTED_STATUS
    requeue = subprocess.run(["scontrol", "requeue", str(job)], capture_output=True, text=True)
    if requeue.returncode:  # with Requeue=0, for example
        logger.warning("not requeued: %s", requeue.stderr.strip())
        return PREEMPTED_STATUS
    logger.info("requeued")
    # SLURM now ends this process. To leave before that would look like the end of the job, to stay
    # longer would cost KillWait.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(REQUEUE_SECONDS)
    return PREEMPTED_STATUS


def _state_of(job: int) -> str:
    """RUNNING, PENDING, COMPLETING (cancelled, or out of time), ..., as SLURM calls a job."""
    show = ["scontrol", "show", "job", str(job), "--oneliner"]
    text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    return text.partition("JobState=")[2].split()[0]


def _srun(hosts: list[Host], folder: RunFolder, port: int, arguments: list[str]) -> list[str]:
    hostfile = folder.launch / "hosts"
    write_hostfile(hostfile, hosts)
    options = [f"--nodes={len(hosts)}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # since 22.05 srun does not take it over
        options.append(f"--cpus-per-task={cpus}")
    options += shlex.split(os.environ.get("SRUN_OPTIONS", ""))
    python = os.environ.get("NODE_PYTHON") or sys.executable
    node = [python, "-m", "vqrae_ds.launching.node"]
    node += [str(hostfile), os.environ.get("MASTER_ADDR") or hosts[0].name, str(port)]
    return ["srun", *options, *node, *arguments]


def _of_slurm(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"{name} is not set: this runs in a job, sbatch launchers/slurm.sbatch")
    return os.environ[name]


if __name__ == "__main__":
    run_tool(main)
