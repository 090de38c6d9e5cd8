"""What the nodes answered, judged: a cell for each check and node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqrae_ds.config.data_paths import FROM_IMAGES, index_command
from vqrae_ds.launching import room
from vqrae_ds.launching.hosts import Host
from vqrae_ds.launching.needs import PACKAGE, Needs
from vqrae_ds.launching.table import SKIPPED, Cell, broken, note, ok

GB = 10**9
MAX_SKEW_SECONDS = 5.0
NAMED = 3  # of many files that are missing
_NETWORK = "look at firewalls, routes, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
_FOR_A_GROUP = ("reachable", "python", "packages", "code", "port")


class Report(NamedTuple):
    """What one node said. `facts` are the probe's, {"value"}, {"error"} or {"late"} each.

    `ahead` is by how many seconds its clock is ahead of this machine's, and `lost` why there is no
    answer at all.
    """

    host: Host
    facts: Mapping[str, Any]
    ahead: float = 0.0
    lost: str = ""


Judge = Callable[[Any, Report], Cell]


def judge(reports: Sequence[Report], needs: Needs) -> dict[str, list[Cell]]:
    """The columns of the table, but for the all-reduce."""
    columns = {
        "reachable": [broken(r.lost) if r.lost else ok() for r in reports],
        "python": _cells(reports, "python", _like_most(reports, "python", "Python {}".format)),
        "packages": _cells(reports, "packages", _packages(reports)),
        "code": _cells(reports, "code", _code(reports, needs)),
        "config": _cells(reports, "config", _config(reports)),
        "gpus": _gpus(reports, needs),
        "port": _cells(reports, "port", _port(needs)),
        "clock": _clocks(reports),
        "folder": _cells(reports, "run folder", lambda value, _: ok(), needs.run_folder),
        "shared": _shared(reports, needs),
        "disk": _cells(
            reports, "disk", lambda disk, _: room.for_run(disk, needs), needs.run_folder
        ),
    }
    if needs.local_dir is not None:
        columns["local disk"] = _local_disk(reports, needs)
    data = [
        _cells(reports, setting, _shards(folder), folder) for setting, folder in needs.data.items()
    ]
    columns["data"] = [_worst(cells) for cells in zip(*data, strict=True)]
    columns["weights"] = _cells(reports, "weights", _weights)
    return columns


def can_form_a_group(columns: Mapping[str, Sequence[Cell]]) -> bool:
    """Whether an all-reduce has a chance, so that its failure would be a finding of its own."""
    return all(cell.state != "broken" for name in _FOR_A_GROUP for cell in columns[name])


def judge_all_reduce(reports: Sequence[Report]) -> list[Cell]:
    """The column of the all-reduce; its facts are called "all_reduce"."""
    cells = []
    for found in (report.facts["all_reduce"] for report in reports):
        if "value" in found:
            value = found["value"]
            speed = f"{value['bytes_per_second'] / GB:.2f} GB/s"
            cells.append(ok(f"{speed} {value['backend']} {value['interface']}"))
        else:
            error = found.get("error") or f"no end within {found['late']:.0f} s"
            cells.append(broken(f"{error.removeprefix('RuntimeError: ')} ({_NETWORK})"))
    return cells


def _cells(reports: Sequence[Report], fact: str, judge_one: Judge, place: str = "") -> list[Cell]:
    """A fact judged on each node where it was found out; `place` is the path that it is about."""
    cells, prefix = [], f"{place}: " if place else ""
    for report in reports:
        found = report.facts.get(fact)
        if found is None:
            cells.append(SKIPPED)
        elif "late" in found:
            hangs = f"{prefix}no answer within {found['late']:.1f} s: a file server or a device"
            cells.append(broken(f"{hangs} hangs; look on the node with `df` and `nvidia-smi`"))
        elif "error" in found:
            error = found["error"]
            cells.append(broken(error if place in error else prefix + error))
        else:
            cells.append(judge_one(found["value"], report))
    return cells


def _values(reports: Sequence[Report], fact: str) -> dict[str, Any]:
    """What a fact is on each node where it could be found out."""
    return {
        report.host.name: report.facts[fact]["value"]
        for report in reports
        if "value" in report.facts.get(fact, {})
    }


def _most(values: Mapping[str, Any]) -> tuple[Any, str]:
    """The value of most nodes, and the first of these; at a tie that of the first node."""
    value = Counter(values.values()).most_common(1)[0][0]
    return value, next(name for name, own in values.items() if own == value)


def _like_most(reports: Sequence[Report], fact: str, in_words: Callable[[Any], str]) -> Judge:
    values = _values(reports, fact)

    def judge_one(value: Any, _: Report) -> Cell:
        usual, where = _most(values)
        if value == usual:
            return ok()
        return broken(f"{in_words(value)}, but {in_words(usual)} on {where}: install the same")

    return judge_one


def _packages(reports: Sequence[Report]) -> Judge:
    everywhere = _values(reports, "packages")

    def judge_one(value: Any, _: Report) -> Cell:
        faults = []
        for name, version in value.items():
            installed = {node: own[name] for node, own in everywhere.items() if own[name]}
            if version is None:
                # A checkout that is run from its folder has no version: `code` looks after it.
                if name != PACKAGE:
                    faults.append(f"{name} is not installed")
                continue
            usual, where = _most(installed)
            if version != usual:
                faults.append(f"{name} {version}, but {usual} on {where}")
        return broken(f"{'; '.join(faults)}: install the same everywhere") if faults else ok()

    return judge_one


def _code(reports: Sequence[Report], needs: Needs) -> Judge:
    found = {name: own["digest"] for name, own in _values(reports, "code").items()}
    digests = {name: digest for name, digest in found.items() if digest}

    def judge_one(value: Any, _: Report) -> Cell:
        if value["digest"] is None:
            return broken(
                f"{PACKAGE} cannot be imported: it is neither in {needs.folder} nor on PYTHONPATH "
                "nor installed"
            )
        usual, where = _most(digests)
        if value["digest"] == usual:
            return ok()
        return broken(
            f"{value['folder']} is another revision than on {where}: its .py files hash to "
            f"{value['digest']}, there to {usual}. Bring both to one commit"
        )

    return judge_one


def _config(reports: Sequence[Report]) -> Judge:
    everywhere = _values(reports, "config")

    def judge_one(value: Any, _: Report) -> Cell:
        for path, digest in value.items():
            usual, where = _most({node: own[path] for node, own in everywhere.items()})
            if digest != usual:
                return broken(f"{path} differs from the one on {where}: copy one to all nodes")
        return ok()

    return judge_one


def _gpus(reports: Sequence[Report], needs: Needs) -> list[Cell]:
    counts = _values(reports, "gpus")

    def judge_one(count: Any, report: Report) -> Cell:
        slots = report.host.slots
        if slots > count:
            return broken(
                f"{slots} slots, but {count} GPUs are visible: correct the slots, or look for "
                "what is missing with `nvidia-smi -L` and CUDA_VISIBLE_DEVICES"
            )
        if 0 < slots < count:
            return note(f"{slots}/{count}", f"{count - slots} of its GPUs get no rank")
        return ok(str(count))

    if needs.uses_gpus and any(counts.values()):
        return _cells(reports, "gpus", judge_one)
    why = "no node has one" if needs.uses_gpus else "DS_ACCELERATOR is cpu"
    on_cpu = note("none", f"{why}, so slots are held against nothing")
    if needs.uses_gpus:
        return _cells(reports, "gpus", lambda count, report: on_cpu)
    return [SKIPPED if report.lost else on_cpu for report in reports]


def _port(needs: Needs) -> Judge:
    def judge_one(is_free: Any, _: Report) -> Cell:
        if is_free:
            return ok(str(needs.port))
        return broken(
            f"port {needs.port} is taken: `ss -ltnp 'sport = :{needs.port}'` over there shows by "
            "whom; end it, or choose another with --master_port"
        )

    return judge_one


def _clocks(reports: Sequence[Report]) -> list[Cell]:
    first = next((report for report in reports if not report.lost), None)
    cells = []
    for report in reports:
        skew = 0.0 if report.lost else report.ahead - first.ahead
        if report.lost:
            cells.append(SKIPPED)
        elif abs(skew) > MAX_SKEW_SECONDS:
            side = "ahead of" if skew > 0 else "behind"
            cells.append(
                broken(
                    f"its clock is {abs(skew):.1f} s {side} that of {first.host.name}: times of "
                    "files and logs mislead; start chronyd or ntpd"
                )
            )
        else:
            cells.append(ok(f"{skew:+.2f} s"))
    return cells


def _shared(reports: Sequence[Report], needs: Needs) -> list[Cell]:
    """The first node that could write looks for all tokens, each other one for that node's."""
    first = next((r.host.name for r in reports if "shared" in r.facts), None)
    seen_by_first = _values(reports, "shared").get(first, {})

    def judge_one(seen: Any, report: Report) -> Cell:
        if report.host.name == first or (all(seen.values()) and seen_by_first[report.host.name]):
            return ok()
        return broken(
            f"{needs.run_folder} is not the folder that {first} has under this name: a file "
            "written on one is not seen on the other. run.output_dir must be on a shared disk"
        )

    return _cells(reports, "shared", judge_one, needs.run_folder)


def _local_disk(reports: Sequence[Report], needs: Needs) -> list[Cell]:
    """Room on each node's own disk for what its ranks write of a checkpoint."""
    ranks = sum(report.host.slots for report in reports)

    def judge_one(free: Any, report: Report) -> Cell:
        share = report.host.slots / ranks if ranks else 1 / len(reports)
        return room.on_node(free, share, needs)

    return _cells(reports, "local", judge_one, needs.local_dir)


def _shards(folder: str) -> Judge:
    rebuild = f"copy it again, or {index_command(Path(folder))}"

    def judge_one(value: Any, _: Report) -> Cell:
        if value["shards"] is None:
            return note("index", f"the index of {folder} is too large to look at every shard")
        faults = [f"{folder}/{name} {fault}" for name, fault in value["faults"]]
        if faults:
            more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
            way_out = rebuild if value["shards"] else f"{rebuild}; {FROM_IMAGES}"
            return broken(f"{', '.join(faults[:NAMED])}{more}: {way_out}")
        if value["checked"] < value["mine"]:
            looked = f"{value['checked']} of {value['mine']} shards looked at in {folder}"
            return note("part", f"{looked}: its file system is slow")
        return ok()

    return judge_one


def _weights(faulty: Any, _: Report) -> Cell:
    if not faulty:
        return ok()
    faults = ", ".join(f"{setting}: {path} {fault}" for setting, path, fault in faulty)
    return broken(f"{faults}: copy it to a shared disk, or let this user read it")


def _worst(cells: Sequence[Cell]) -> Cell:
    order = ("broken", "note", "ok", "skipped")
    worst = min(cells, key=lambda cell: order.index(cell.state))
    details = dict.fromkeys(cell.detail for cell in cells if cell.state == worst.state)
    return worst._replace(detail=" | ".join(details))
