"""What every benchmark hands back: rows of ours against a peer, and the machine they are from."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vqrae_ds.text_table import columns


class Row(NamedTuple):
    """One figure of ours beside that of the peer, both in `unit`."""

    metric: str
    ours: float
    peer: float
    peer_name: str
    unit: str

    @property
    def ratio(self) -> float | None:
        """ours / peer; None where the peer is 0, as it is for what must not happen at all."""
        return self.ours / self.peer if self.peer else None


class Report(NamedTuple):
    """A finished benchmark. `details` are its further figures, by name, as JSON can hold them."""

    name: str
    machine: str
    rows: Sequence[Row]
    details: dict[str, Any]


class Goal(NamedTuple):
    """The range in which the ratio of a row should be, both ends included; None is no end."""

    least: float
    most: float | None


def judge(rows: Sequence[Row], goals: Mapping[str, Goal]) -> dict[str, dict[str, Any]]:
    """Of each row with a goal, by its metric: the goal, and whether the ratio is within it."""
    found = {row.metric: row.ratio for row in rows}
    verdicts = {}
    for metric, goal in goals.items():
        ratio = found[metric]
        assert ratio is not None, f"{metric} has a goal and no ratio"
        is_met = goal.least <= ratio and (goal.most is None or ratio <= goal.most)
        verdicts[metric] = {"ratio_from": goal.least, "ratio_to": goal.most, "is_met": is_met}
    return verdicts


def as_json(report: Report) -> str:
    """`name`, `machine`, `rows` with their ratios, and `details`."""
    rows = [{**row._asdict(), "ratio": row.ratio} for row in report.rows]
    return json.dumps({**report._asdict(), "rows": rows}, indent=2) + "\n"


def as_text(report: Report) -> str:
    """The rows in aligned columns under the machine; a ratio that is not defined is a dash."""
    lines = [("metric", "ours", "peer", "unit", "ratio", "peer is")]
    for row in report.rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.4f}"
        figures = (f"{row.ours:.4g}", f"{row.peer:.4g}")
        lines.append((row.metric, *figures, row.unit, ratio, row.peer_name))
    return "\n".join([f"{report.name}: {report.machine}", *columns(lines)])


def describe_machine(device_type: str) -> str:
    """The processor that the figures are from, `cpu` or `cuda`, and the versions that matter."""
    if device_type == "cuda":
        processor = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        processor = f"{_cpu_name()}, {os.cpu_count()} cores"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    return f"{processor}, {packages}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; `platform` knows the architecture alone there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
