"""Examines the nodes of a run before it is started, all at once, in less than ten seconds.

    launchers/doctor --hostfile HOSTS --config Y.yaml --deepspeed_config J.json [a.b=value ...]

Exit status: 0 the run can be started, 1 something is broken and named, 2 a mistake in the command
or its files. The launchers look at their nodes by `look_before_launch`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.config import read_run
from vqrae_ds.launching.connections import Way
from vqrae_ds.launching.examination import SHORTEST_SECONDS, examine
from vqrae_ds.launching.hosts import Host, port_of, port_of_run, read_hostfile
from vqrae_ds.launching.needs import Needs, needs_of
from vqrae_ds.launching.processes import after_name
from vqrae_ds.launching.slurm_job import hosts_of_job, job_id
from vqrae_ds.launching.table import is_sound, render

LOCAL_PORT = 29500  # of the `deepspeed` command
SECONDS = 10.0
ENOUGH_SECONDS = 8.0  # for the nodes, however long the doctor's own start took
# Steps of SLURM and an interpreter over a busy file server take their time. A node that is called
# broken for it costs a launch more than waiting does.
LAUNCH_SECONDS = 30.0  # DOCTOR_SECONDS

EXAMPLE = """\
example:
  launchers/doctor --hostfile hosts --config ds_configs/internvit_6b/stage1.yaml \\
      --deepspeed_config ds_configs/stage1_zero3.json run.output_dir=runs/stage1
  launchers/doctor --slurm --config ...         in sbatch or salloc
  launchers/doctor --local --slots 8 --config ...

It looks at: ssh or srun, Python, packages, the code's revision, the configuration, slots and GPUs,
the master's port, clocks, the run's folder, free disk for checkpoints in it and in
checkpoint.local_dir, shards, weights.
"""


def main() -> None:
    """Parse the command line, examine, print the table; the exit status is the module's."""
    args = _build_parser().parse_intermixed_args()
    hosts, way = _hosts_of(args)
    config, deepspeed = Path(args.config), Path(args.deepspeed_config)
    run = read_run(
        config,
        deepspeed,
        overrides=args.overrides,
        world_size=max(1, sum(host.slots for host in hosts)),
        allowed_keys=args.allow_untested_key,
        check_paths=False,  # the nodes look, where it matters
    )
    port = args.master_port or _usual_port(way, Path(run.config.run.output_dir))
    if not 0 < port < 1 << 16:
        raise ValueError(f"--master_port {port} is not a port: 1 to 65535")
    is_sound_to_start = look(
        hosts,
        way,
        needs_of(run, config, deepspeed, args.overrides, port),
        seconds=left_after_start(args.seconds),
        master_address=args.master_addr,
        bandwidth_seconds=args.bandwidth_seconds if args.bandwidth else None,
    )
    sys.exit(0 if is_sound_to_start else 1)


def left_after_start(seconds: float) -> float:
    """What the nodes have of `seconds` that began with this process: an interpreter starts slowly.

    They keep `ENOUGH_SECONDS`, or all of fewer.
    """
    ticks = after_name(Path("/proc/self/stat").read_text())[19]
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return min(seconds, max(ENOUGH_SECONDS, seconds - age))


def look(
    hosts: Sequence[Host],
    way: Way,
    needs: Needs,
    *,
    seconds: float,
    master_address: str = "",
    bandwidth_seconds: float | None = None,
) -> bool:
    """Examine the nodes, which have `seconds` to answer, and print the table; whether it is sound.

    `master_address` and `bandwidth_seconds` are those of `examine`. Raises `ValueError` where
    `seconds` are too few.
    """
    if seconds < SHORTEST_SECONDS:
        raise ValueError(f"the nodes have {seconds:g} s to answer: {SHORTEST_SECONDS:g} or more")
    found = asyncio.run(
        examine(
            hosts,
            way,
            needs,
            seconds=seconds,
            master_address=master_address,
            bandwidth_seconds=bandwidth_seconds,
        )
    )
    sound = is_sound(found.columns)
    sys.stdout.write(render([host.name for host in hosts], found.columns) + "\n")
    if way == "ssh" and shutil.which("pdsh") is None:
        sys.stdout.write("note: pdsh is not installed here; `deepspeed --hostfile` starts by it\n")
    verdict = "sound" if sound else "BROKEN: do not start yet"
    nodes = "1 node" if len(hosts) == 1 else f"{len(hosts)} nodes"
    sys.stdout.write(f"\n{nodes} in {found.seconds:.1f} s: {verdict}\n")
    sys.stdout.flush()  # before what a launcher logs next
    return sound


def look_before_launch(hosts: Sequence[Host], way: Way, needs: Needs) -> bool:
    """`look` as the environment of a launch script has it; with DOCTOR=no all is taken for sound.

    Raises `ValueError` where DOCTOR_SECONDS is no number of seconds.
    """
    if os.environ.get("DOCTOR") == "no":
        return True
    seconds = float(os.environ.get("DOCTOR_SECONDS") or LAUNCH_SECONDS)
    address = os.environ.get("MASTER_ADDR", "")
    return look(hosts, way, needs, seconds=seconds, master_address=address)


def _usual_port(way: Way, run_folder: Path) -> int:
    """The port that the launch scripts take by themselves."""
    if way == "srun":
        return port_of(job_id())
    return port_of_run(run_folder) if way == "ssh" else LOCAL_PORT


def _hosts_of(args: argparse.Namespace) -> tuple[list[Host], Way]:
    if args.hostfile is not None:
        return read_hostfile(Path(args.hostfile)), "ssh"
    if args.slurm:
        return hosts_of_job(), "srun"
    return [Host("localhost", args.slots)], "local"


def _build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="launchers/doctor",
        description="Examine the nodes of a run before it is started.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    nodes = parser.add_mutually_exclusive_group(required=True)
    nodes.add_argument("--hostfile", metavar="F", help="lines `NAME slots=GPUS`; nodes by ssh")
    nodes.add_argument("--slurm", action="store_true", help="the nodes of this job, by srun")
    nodes.add_argument("--local", action="store_true", help="this machine alone")
    add = parser.add_argument
    add("--slots", type=int, default=0, metavar="N", help="ranks, with --local")
    add("--config", required=True, metavar="YAML", help="as for the trainer")
    add("--deepspeed_config", required=True, metavar="JSON", help="as for the trainer")
    given = {name: os.environ.get(name, "") for name in ("MASTER_PORT", "MASTER_ADDR")}
    port = given["MASTER_PORT"] or None
    add("--master_port", type=int, default=port, metavar="P", help="else as the launch scripts")
    add("--master_addr", default=given["MASTER_ADDR"], metavar="A", help="likewise")
    add("--seconds", type=float, default=SECONDS, metavar="S", help="until a node is lost (10)")
    add("--bandwidth", action="store_true", help="an all-reduce over all nodes; imports torch")
    add("--bandwidth-seconds", type=float, default=60, metavar="S", help="its time limit (60)")
    add("--allow-untested-key", action="append", default=[], metavar="KEY", help="as there")
    add("overrides", nargs="*", metavar="a.b=value", help="as for the trainer")
    return parser


if __name__ == "__main__":
    run_tool(main)
