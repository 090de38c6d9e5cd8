"""What a conversion costs beside DeepSpeed's own zero_to_fp32, on the same ZeRO-3 checkpoint.

Both write every weight as fp32 in safetensors, each in a process of its own with one thread. The
processor time is of the whole process, imports included; memory is what belongs to the process
alone (RssAnon), without the pages of mapped files, which the kernel takes back as it likes. A
process that has imported PyTorch and does nothing has some hundred MB of it, so that the rows
`above_start` show what the conversion adds. Ours reads the whole checkpoint once more, to compare
its checksums.

Both take turns, and figures are medians. An output is removed before its side writes the next one.
All tensors of the first two are compared, once.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from vqrae_ds.benchmarks.table import Report, Row, describe_machine
from vqrae_ds.benchmarks.zero_checkpoint import Shape, write_checkpoint
from vqrae_ds.conversion.output_folder import check_space

NUM_RANKS = 8
WIDTH = 1024
PEER = "zero_to_fp32"
SAMPLE_SECONDS = 0.002


class Cost(NamedTuple):
    """Of one process, from its start to its end."""

    cpu_seconds: float
    wall_seconds: float
    peak_anonymous_bytes: int


class Costs(NamedTuple):
    """Of both sides, round by round."""

    ours: list[Cost]
    peer: list[Cost]

    def medians(self) -> tuple[Cost, Cost]:
        """Of ours and of the peer's, each figure by itself."""
        ours, peer = (Cost(*map(statistics.median, zip(*costs, strict=True))) for costs in self)
        return ours, peer

    def of_all_rounds(self) -> dict[str, dict[str, list[float]]]:
        """The figures by side and by name."""
        return {
            side: {name: [getattr(cost, name) for cost in costs] for name in Cost._fields}
            for side, costs in self._asdict().items()
        }


class Converted(NamedTuple):
    """What the conversions of one checkpoint cost, and in how many tensors they differ."""

    costs: Costs
    differing: int


def measure_convert(
    tool: Path, sizes: Sequence[float], folder: Path | None = None, rounds: int = 5
) -> Report:
    """Convert models of about `sizes` parameters `rounds` times by each side.

    `tool` is tools/convert_checkpoint.py. All files are made in `folder`, a temporary one by
    default, and removed. Raises `ValueError` where its disk is too small, and `RuntimeError` where
    a conversion fails.
    """
    rows: list[Row] = []
    helps = {"ours": [sys.executable, str(tool), "--help"], "peer": [*_peer_command(), "--help"]}
    starts = take_turns(helps, rounds)
    details: dict[str, Any] = {"rounds": rounds, "start": starts.of_all_rounds()}
    for size in sizes:
        blocks = max(round(size / (2 * 12 * WIDTH**2)), 1)
        shape = Shape(WIDTH, blocks, blocks)
        name = f"{shape.numel / 1e6:.0f}M"
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            # Checkpoint: half in bf16, half in fp32. Two outputs in fp32. Zeros take no room.
            check_space(Path(temporary) / "all", shape.numel * (3 + 2 * 4))
            costs, differing = _convert_both(Path(temporary), tool, shape, rounds)
        ours, peer = costs.medians()
        memory = [cost.peak_anonymous_bytes / 1e6 for cost in (ours, peer)]
        idle = [cost.peak_anonymous_bytes / 1e6 for cost in starts.medians()]
        above = [max(peak - start, 0) for peak, start in zip(memory, idle, strict=True)]
        rows += [
            Row(f"cpu_time_{name}", ours.cpu_seconds, peer.cpu_seconds, PEER, "s"),
            Row(f"peak_anonymous_memory_{name}", *memory, PEER, "MB"),
            Row(f"peak_anonymous_memory_above_start_{name}", *above, PEER, "MB"),
            Row(f"tensors_that_differ_{name}", differing, 0, "allowed", "tensors"),
        ]
        details[name] = costs.of_all_rounds()
    machine = f"{NUM_RANKS} ranks' files on {describe_machine('cpu')}"
    return Report("convert", machine, rows, details)


def _convert_both(folder: Path, tool: Path, shape: Shape, rounds: int) -> Converted:
    checkpoint = folder / "step_00001000"
    write_checkpoint(checkpoint, shape, NUM_RANKS)
    outputs = {"ours": folder / "ours", "peer": folder / "peer"}
    flags = ["--tag", "generator", "--safe_serialization"]
    commands = {
        "ours": [sys.executable, str(tool), str(checkpoint), str(outputs["ours"])]
        + ["--to", "inference"],
        "peer": [*_peer_command(), str(checkpoint), str(outputs["peer"]), *flags],
    }
    differing = 0

    def compare_and_remove(number: int) -> None:
        nonlocal differing
        if number == 0:
            differing = count_differing(*outputs.values())
        for output in outputs.values():
            shutil.rmtree(output)

    return Converted(take_turns(commands, rounds, compare_and_remove), differing)


def take_turns(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    after_round: Callable[[int], None] = lambda number: None,
) -> Costs:
    """Measure the commands of `ours` and `peer` by turns, every second round the other way round.

    `after_round` gets the number of each round, from 0, that is over. Raises `RuntimeError` where a
    command fails.
    """
    costs = Costs([], [])
    for number in range(rounds):
        for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
            getattr(costs, side).append(measure(commands[side]))
        after_round(number)
    return costs


def _peer_command() -> list[str]:
    return [sys.executable, "-m", "deepspeed.utils.zero_to_fp32"]


def measure(command: Sequence[str], **variables: str) -> Cost:
    """Run `command` to its end, with one thread. Raises `RuntimeError` where it fails.

    `variables` are set in its environment.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as output:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        while True:
            # Not `process.poll`, which throws away what the process took.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, peak)


def anonymous_memory(pid: int) -> int:
    """Bytes of a process that no file backs; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) << 10 if found else 0


def count_differing(ours: Path, peer: Path) -> int:
    """Tensors that are not equal in every bit, or that only one of two folders holds.

    Ours has the names without the prefix of the trainer's model.
    """
    names = [_names(folder) for folder in (ours, peer)]
    names[1] = {name.removeprefix("vqrae."): place for name, place in names[1].items()}
    differing = len(names[0].keys() ^ names[1].keys())
    for name in names[0].keys() & names[1].keys():
        first, second = (_read(*places[name]) for places in names)
        if first.dtype != second.dtype or first.shape != second.shape:
            differing += 1
        else:
            bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (first, second))
            differing += not torch.equal(*bits)
    return differing


def _names(folder: Path) -> dict[str, tuple[Path, str]]:
    """Where each tensor lies: the file, and its name there."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: (path, name) for name in file.keys()}  # noqa: SIM118 - a handle
    return found


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
