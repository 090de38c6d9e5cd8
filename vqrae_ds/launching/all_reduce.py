"""One rank of a few all-reduces over all nodes: whether they reach one another, and how fast.

    python -m vqrae_ds.launching.all_reduce '{"rank": 0, ...}'     (the fields of `Settings`)

The process group is a real one, NCCL with GPUs and gloo without, and needs no DeepSpeed. The last
line of the output is the result as JSON, behind the probe's mark. Exit status 1 and a line on
stderr where it fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vqrae_ds.launching.probe import MARK

if TYPE_CHECKING:
    import torch

VALUES, REPEATS = 1 << 22, 5  # 16 MiB of fp32
_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Settings(NamedTuple):
    """One of `world_size` ranks, one a node; the first listens on `address`:`port`."""

    rank: int
    world_size: int
    address: str
    port: int
    seconds: float  # until the process ends, come what may
    uses_gpus: bool


def main() -> None:
    """Measure, and write the result down."""
    began = time.monotonic()
    settings = Settings(**json.loads(sys.argv[1]))
    signal.alarm(round(settings.seconds) + 1)  # its default action ends a process in any state
    try:
        result = measure(settings, began + settings.seconds)
    except (RuntimeError, ValueError, ImportError) as error:
        sys.exit((str(error).strip() or type(error).__name__).splitlines()[0])
    sys.stdout.write(f"\n{MARK}{json.dumps(result)}\n")
    sys.stdout.flush()
    os._exit(0)  # threads of a process group may hold up the interpreter's end


def measure(settings: Settings, deadline: float) -> dict[str, Any]:
    """{"backend", "interface", "bytes_per_second"}; raises `RuntimeError` where a peer is missing.

    The bandwidth is that of the bus, 2 (n - 1) / n of the size by the time, as nccl-tests
    (doc/PERFORMANCE.md of github.com/NVIDIA/nccl-tests) define it: it does not depend on n.
    """
    import torch
    import torch.distributed as dist

    log = None
    if settings.uses_gpus:
        log = Path(tempfile.mkdtemp(), "nccl.txt")
        os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(log)}
        torch.cuda.set_device(0)
    # Ends before the process is ended, so that it can say which peer it waited for.
    timeout = timedelta(seconds=max(1.0, deadline - time.monotonic() - 2.0))
    dist.init_process_group(
        "nccl" if settings.uses_gpus else "gloo",
        init_method=f"tcp://{settings.address}:{settings.port}",
        rank=settings.rank,
        world_size=settings.world_size,
        timeout=timeout,
    )
    values = torch.ones(VALUES, device="cuda" if settings.uses_gpus else "cpu")
    seconds = _time(values)  # after the connections are made by a first one
    if not bool((values == settings.world_size).all()):
        raise RuntimeError("the all-reduce gave a wrong sum: the network damages what it carries")
    size = values.numel() * values.element_size()
    share = 2 * (settings.world_size - 1) / settings.world_size
    return {
        "backend": "NCCL" if settings.uses_gpus else "gloo",
        "interface": _of_nccl(log) if log is not None else _of_gloo(),
        "bytes_per_second": share * size / seconds,
    }


def _time(values: torch.Tensor) -> float:
    """Seconds of an all-reduce; `values` are summed over the ranks once."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(values)
    others, began = values.clone(), 0.0
    for repeat in range(REPEATS + 1):
        if repeat == 1:  # the first one waits for the slowest rank
            began = _now(values)
        dist.all_reduce(others, op=dist.ReduceOp.MAX)
    seconds = (_now(values) - began) / REPEATS
    slowest = torch.tensor([seconds], device=values.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def _now(values: torch.Tensor) -> float:
    import torch

    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _of_gloo() -> str:
    """What gloo listens on: GLOO_SOCKET_IFNAME, else where the host's own name leads."""
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    if given:
        return given
    address = socket.gethostbyname(socket.gethostname())
    return next((name for name, own in interfaces().items() if own == address), address)


def _of_nccl(log: Path) -> str:
    """What NCCL says that it uses, "IB mlx5_0:1/IB" or "Socket eth0:10.0.0.1" for example."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    log.unlink(missing_ok=True)
    log.parent.rmdir()
    used = re.search(r"NET/(\w+) : Using \[0\]([^\s<]+)", text)
    return f"{used[1]} {used[2]}" if used else "unknown"


def interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


if __name__ == "__main__":
    main()
