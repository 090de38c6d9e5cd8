"""What a batch job of SLURM does: check, train on its nodes, and go back into the queue.

    python -m vqrae_ds.launching.slurm CONFIG.yaml DEEPSPEED.json [a.b=value ...]

It is the batch shell's last command (launchers/slurm.sbatch), so that SLURM's signals to the batch
shell arrive here. They become the file STOP in the run's folder. The ranks save and mark the run
as PREEMPTED; then the job is requeued, and its next start goes on from the checkpoint. A start that
saved nothing is not repeated, or a time limit that is too short would repeat it for ever.

A job that is new fails at once where the doctor finds a broken node. One that was requeued has
much to lose, and what it waits for may be on its way: it looks again for some minutes, and is then
held in the queue.

Exit status: 0 only where the marker DONE is there; 85 where a run that was stopped cannot be
requeued; 2 a user's mistake; else 1 or srun's. No other status says how a run ended: srun and
DeepSpeed's launcher pass on that of a rank sometimes, or 143, or 0.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.launching.connections import node_python
from vqrae_ds.launching.doctor import look_before_launch
from vqrae_ds.launching.hosts import Host, port_of, write_hostfile
from vqrae_ds.launching.needs import Needs, needs_of
from vqrae_ds.launching.owner import this_process
from vqrae_ds.launching.run_folder import (
    RunFolder,
    add_trainer_arguments,
    check_run,
    trainer_arguments,
)
from vqrae_ds.launching.slurm_job import Refused, hosts_of_job, job_id, requeue, state_of
from vqrae_ds.stopping import DONE, PREEMPTED, PREEMPTED_STATUS, SIGNALS

logger = logging.getLogger(__name__)

REQUEUE_SECONDS = 120  # in which SLURM must have ended a job that it requeues
LOOK_AGAIN_SECONDS, PAUSE_SECONDS = 300, 20  # of a job that was requeued, at nodes that are broken


def main() -> None:
    """Run the job of this allocation to its end."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    parser = OneLineParser(description="Train in this allocation of SLURM.", allow_abbrev=False)
    add_trainer_arguments(parser)
    args = parser.parse_args()
    arguments = trainer_arguments(args.config, args.deepspeed_config, args.others)

    hosts, job = hosts_of_job(), job_id()
    files, port = (Path(args.config), Path(args.deepspeed_config)), port_of(job)
    run = check_run(arguments, sum(host.slots for host in hosts))
    folder = RunFolder(Path(run.config.run.output_dir))
    folder.turn_signals_into_stop()
    folder.open(this_process(job))
    with closing(folder):
        sys.exit(_train(folder, job, hosts, needs_of(run, *files, args.others, port), arguments))


def _train(
    folder: RunFolder, job: int, hosts: list[Host], needs: Needs, arguments: list[str]
) -> int:
    """The exit status of the job, after all that its nodes can do in this start."""
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    names = " ".join(host.name for host in hosts)
    logger.info("job %d, start %d, on %s: %s", job, start, names, folder.path)
    if not _find_sound(hosts, needs, folder, LOOK_AGAIN_SECONDS if start else 0):
        return _end_before_launch(folder, job, start)
    known = folder.checkpoints()
    command = _srun(hosts, folder, needs.port, arguments)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as srun:
        status = srun.wait()
    return _end(folder, job, status, has_saved=bool(folder.checkpoints() - known))


def _find_sound(hosts: list[Host], needs: Needs, folder: RunFolder, patience: float) -> bool:
    """Whether the doctor finds the nodes sound, before `patience` is over and a signal comes."""
    deadline = time.monotonic() + patience
    while not folder.times_asked:
        if look_before_launch(hosts, "srun", needs):
            return not folder.times_asked
        if time.monotonic() > deadline:
            return False
        pause = time.monotonic() + PAUSE_SECONDS
        while time.monotonic() < pause and not folder.times_asked:
            time.sleep(1)
    return False


def _end_before_launch(folder: RunFolder, job: int, start: int) -> int:
    """The exit status of a job whose ranks are not to be started.

    Who is preempted finds its nodes broken too: SLURM ends the steps of the doctor.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    is_asked = folder.times_asked > 0
    if is_asked or start or _is_preempted(job):
        return _requeue(job, has_saved=False, hold=bool(start) and not is_asked)
    return 1


def _end(folder: RunFolder, job: int, status: int, *, has_saved: bool) -> int:
    """The exit status of the job, by the marker; a job that was stopped is requeued."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # nothing more to ask the ranks for
    marker = folder.marker()
    logger.info("srun ended with status %d; marker: %s", status, marker or "none")
    if marker == DONE:
        return 0
    if marker != PREEMPTED:
        return status if 0 < status < 128 and status != PREEMPTED_STATUS else 1
    return _requeue(job, has_saved=has_saved)


def _is_preempted(job: int) -> bool:
    try:
        return state_of(job).is_preempted
    except Refused:
        return False


def _requeue(job: int, *, has_saved: bool, hold: bool = False) -> int:
    """Put the job back into the queue, `hold` it there where it is not preempted; an exit status.

    One that was asked to stop comes back if it has saved since its start, or if it is preempted.
    """
    try:
        state = state_of(job)
        if state.name != "RUNNING":
            # SLURM has ended the job: it was cancelled, and would come back if it were asked for.
            # Or SLURM has put it into the queue itself.
            logger.info("not requeued from here: SLURM calls the job %s", state.name)
            return PREEMPTED_STATUS
        if not (has_saved or hold or state.is_preempted):
            logger.error(
                "not requeued: no step was saved in this start, so the next one would end like it. "
                "Submit it again with more time than --signal leaves: --time, --signal=B:USR1@300"
            )
            return PREEMPTED_STATUS
        hold = hold and not state.is_preempted
        requeue(job, hold=hold)
    except Refused as refused:  # with Requeue=0, for example
        logger.warning("not requeued: %s", refused)
        return PREEMPTED_STATUS
    logger.info("requeued%s", f" and held: scontrol release {job}" if hold else "")
    # SLURM now ends this process. To leave before that would look like the end of the job, to stay
    # longer would cost KillWait.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(REQUEUE_SECONDS)
    return PREEMPTED_STATUS


def _srun(hosts: list[Host], folder: RunFolder, port: int, arguments: list[str]) -> list[str]:
    hostfile = folder.launch / "hosts"
    write_hostfile(hostfile, hosts)
    # One launcher a node, whatever number of tasks the job was submitted with.
    options = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1"]
    options.append("--kill-on-bad-exit=1")
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # since 22.05 srun does not take it over
        tasks = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
        options.append(f"--cpus-per-task={int(cpus) * tasks}")
    options += shlex.split(os.environ.get("SRUN_OPTIONS", ""))
    node = [node_python("srun"), "-m", "vqrae_ds.launching.node"]
    node += [str(hostfile), os.environ.get("MASTER_ADDR") or hosts[0].name, str(port)]
    return ["srun", *options, *node, *arguments]


if __name__ == "__main__":
    run_tool(main)
