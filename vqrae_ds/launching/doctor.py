"""Examines the nodes of a run before it is started, all at once, in less than ten seconds.

    launchers/doctor --hostfile HOSTS --config Y.yaml --deepspeed_config J.json [a.b=value ...]

Exit status: 0 the run can be started, 1 something is broken and named, 2 a mistake in the command
or its files.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.config import read_run
from vqrae_ds.launching import checks
from vqrae_ds.launching.checks import Report
from vqrae_ds.launching.connections import Connection, NodeLost, Way, connect, probe_text
from vqrae_ds.launching.hostfile import port_of_run
from vqrae_ds.launching.hosts import Host, read_hostfile
from vqrae_ds.launching.needs import Needs, needs_of
from vqrae_ds.launching.slurm import hosts_of_job, port_of_job
from vqrae_ds.launching.table import SKIPPED, Cell, is_sound, render

# From the start: until every node has given its facts, and until they have read one another's
# files. A dead host takes 5 s (connections.CONNECT_SECONDS).
FACTS_BY, SHARED_BY = 7.5, 9.2
CLOCK_READINGS = 3
LOCAL_PORT = 29500  # of the `deepspeed` command

EXAMPLE = """\
example:
  launchers/doctor --hostfile hosts --config ds_configs/internvit_6b/stage1.yaml \\
      --deepspeed_config ds_configs/stage1_zero3.json run.output_dir=runs/stage1
  launchers/doctor --slurm --config ...         in sbatch or salloc
  launchers/doctor --local --slots 8 --config ...

It looks at: ssh or srun, Python, packages, the code's revision, the configuration, slots and GPUs,
the master's port, clocks, the run's folder, free disk for checkpoints, shards, weights.
"""


class Examination(NamedTuple):
    """The columns of the table and how long they took."""

    columns: dict[str, list[Cell]]
    seconds: float


class _Talk(NamedTuple):
    report: Report
    connection: Connection | None


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
    needs = needs_of(run, config, deepspeed, args.overrides, port)
    seconds = args.bandwidth_seconds if args.bandwidth else None
    found = asyncio.run(examine(hosts, way, needs, args.master_addr, seconds))
    sys.stdout.write(render([host.name for host in hosts], found.columns) + "\n")
    if way == "ssh" and shutil.which("pdsh") is None:
        sys.stdout.write("note: pdsh is not installed here; `deepspeed --hostfile` starts by it\n")
    verdict = "sound" if is_sound(found.columns) else "BROKEN: do not start yet"
    nodes = "1 node" if len(hosts) == 1 else f"{len(hosts)} nodes"
    sys.stdout.write(f"\n{nodes} in {found.seconds:.1f} s: {verdict}\n")
    sys.exit(0 if is_sound(found.columns) else 1)


async def examine(
    hosts: Sequence[Host],
    way: Way,
    needs: Needs,
    master_address: str = "",
    bandwidth_seconds: float | None = None,
) -> Examination:
    """Ask all nodes at once; with `bandwidth_seconds` an all-reduce follows, which may take them.

    `master_address` is by default that of the launch scripts. No node's state is changed but
    for files in the run's folder, which are removed.
    """
    began = time.monotonic()
    probe, mark = probe_text(), secrets.token_hex(4)
    tokens = {host.name: f".doctor_{mark}_{number}" for number, host in enumerate(hosts)}
    talks = await asyncio.gather(
        *(
            _interview(host, way, probe, began, needs.details(number, len(hosts), token))
            for number, (host, token) in enumerate(zip(hosts, tokens.values(), strict=True))
        )
    )
    try:
        reports = await _read_tokens(talks, needs.run_folder, tokens, began)
        columns = checks.judge(reports, needs)
        if bandwidth_seconds is not None and len(hosts) > 1:
            columns["all-reduce"] = [SKIPPED] * len(hosts)
            if checks.can_form_a_group(columns):
                # As the launch scripts choose it.
                own = reports[0].facts["address"].get("value") if way == "ssh" else None
                master = master_address or own or hosts[0].name
                found = await _all_reduce(talks, reports, needs, master, bandwidth_seconds)
                columns["all-reduce"] = checks.judge_all_reduce(found)
    finally:
        await asyncio.gather(*(talk.connection.close() for talk in talks if talk.connection))
    return Examination(columns, time.monotonic() - began)


async def _interview(host: Host, way: Way, probe: str, began: float, details: dict) -> _Talk:
    """All that one node can say by itself."""
    connection = None
    try:
        connection = await connect(host.name, way, probe)
        ahead = await _clock_ahead(connection, began + FACTS_BY)
        facts = await connection.ask("inspect", _left(began + FACTS_BY), **details)
    except NodeLost as lost:
        return _Talk(Report(host, {}, lost=str(lost)), connection)
    return _Talk(Report(host, facts, ahead), connection)


async def _clock_ahead(connection: Connection, deadline: float) -> float:
    """By how many seconds the clock over there is ahead, from the quickest of some readings.

    It was read at some time between question and answer, so half a round trip is the error.
    """
    readings = []
    for _ in range(CLOCK_READINGS):
        began = time.time()
        theirs = await connection.ask("clock", _left(deadline))
        ended = time.time()
        readings.append((ended - began, theirs - (began + ended) / 2))
    return min(readings)[1]


async def _read_tokens(
    talks: Sequence[_Talk], folder: str, tokens: dict[str, str], began: float
) -> list[Report]:
    """The reports, to which those who could write add what they see of the others' files."""
    writers = [talk for talk in talks if "value" in talk.report.facts.get("run folder", {})]
    names = [talk.report.host.name for talk in writers]

    async def read(talk: _Talk) -> Report:
        report = talk.report
        if talk not in writers:
            return report
        wanted = names if report.host.name == names[0] else names[:1]
        own = {tokens[name]: name for name in wanted}
        try:
            found = await talk.connection.ask(
                "read", _left(began + SHARED_BY), folder=folder, tokens=list(own)
            )
        except NodeLost as lost:
            return report._replace(lost=str(lost), facts={})
        if "value" in found:
            found = {"value": {own[token]: seen for token, seen in found["value"].items()}}
        return report._replace(facts={**report.facts, "shared": found})

    return list(await asyncio.gather(*map(read, talks)))


async def _all_reduce(
    talks: Sequence[_Talk], reports: Sequence[Report], needs: Needs, master: str, seconds: float
) -> list[Report]:
    """The reports, to which each node adds what its rank of an all-reduce found."""
    uses_gpus = all(report.facts.get("gpus", {}).get("value") for report in reports)

    async def take_part(rank: int) -> Report:
        settings = {"rank": rank, "world_size": len(talks), "address": master, "port": needs.port}
        settings |= {"seconds": seconds, "uses_gpus": uses_gpus}
        where = {"search": needs.search, "folder": needs.folder}
        try:
            found = await talks[rank].connection.ask(
                "all_reduce", seconds + 4, **where, settings=settings
            )
        except NodeLost as lost:
            found = {"error": str(lost)}
        return reports[rank]._replace(facts={**reports[rank].facts, "all_reduce": found})

    return list(await asyncio.gather(*map(take_part, range(len(talks)))))


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def _usual_port(way: Way, run_folder: Path) -> int:
    """The port that the launch scripts take by themselves."""
    if way == "srun":
        return port_of_job(int(os.environ["SLURM_JOB_ID"]))
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
    add("--bandwidth", action="store_true", help="an all-reduce over all nodes; imports torch")
    add("--bandwidth-seconds", type=float, default=60, metavar="S", help="its time limit (60)")
    add("--allow-untested-key", action="append", default=[], metavar="KEY", help="as there")
    add("overrides", nargs="*", metavar="a.b=value", help="as for the trainer")
    return parser


if __name__ == "__main__":
    run_tool(main)
