"""Asks all nodes of a run at once what `needs` has, and has `checks` judge the answers.

A node that says nothing costs the time that was given, and no more.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from vqrae_ds.launching import checks
from vqrae_ds.launching.checks import Report
from vqrae_ds.launching.connections import Connection, NodeLost, Way, connect, probe_text
from vqrae_ds.launching.hosts import Host
from vqrae_ds.launching.needs import Needs
from vqrae_ds.launching.table import SKIPPED, Cell

SHORTEST_SECONDS = 5.0
# Before the end: every node has given its facts, and they have read one another's files.
_FACTS_BEFORE, _SHARED_BEFORE = 2.5, 0.8
CLOCK_READINGS = 3


class Examination(NamedTuple):
    """The columns of the table and how long they took."""

    columns: dict[str, list[Cell]]
    seconds: float


class _Talk(NamedTuple):
    report: Report
    connection: Connection | None


async def examine(
    hosts: Sequence[Host],
    way: Way,
    needs: Needs,
    *,
    seconds: float,
    master_address: str = "",
    bandwidth_seconds: float | None = None,
) -> Examination:
    """Ask all nodes at once; who has not answered after `seconds` is broken.

    With `bandwidth_seconds` an all-reduce follows, which may take them. A dead host takes 5 s
    (connections.CONNECT_SECONDS).

    `master_address` is by default that of the launch scripts. No node's state is changed but
    for files in the run's folder, which are removed.
    """
    began = time.monotonic()
    facts_by, shared_by = began + seconds - _FACTS_BEFORE, began + seconds - _SHARED_BEFORE
    probe, mark = probe_text(), secrets.token_hex(4)
    tokens = {host.name: f".doctor_{mark}_{number}" for number, host in enumerate(hosts)}
    talks = await asyncio.gather(
        *(
            _interview(host, way, probe, facts_by, needs.details(number, len(hosts), token))
            for number, (host, token) in enumerate(zip(hosts, tokens.values(), strict=True))
        )
    )
    try:
        reports = await _read_tokens(talks, needs.run_folder, tokens, shared_by)
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


async def _interview(
    host: Host, way: Way, probe: str, facts_by: float, details: dict[str, Any]
) -> _Talk:
    """All that one node can say by itself."""
    connection = None
    try:
        connection = await connect(host.name, way, probe)
        ahead = await _clock_ahead(connection, facts_by)
        facts = await connection.ask("inspect", _left(facts_by), **details)
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
    talks: Sequence[_Talk], folder: str, tokens: dict[str, str], shared_by: float
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
                "read", _left(shared_by), folder=folder, tokens=list(own)
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
