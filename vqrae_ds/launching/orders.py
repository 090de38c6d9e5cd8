"""What a rank that is started over ssh has to be told, in files that it reads on its node.

DeepSpeed puts arguments and environment into a command line for the remote shell, and quotes them
only in part. Here both lie in a file, `orders.json`, as they are; what passes through the command
line is where that file is, and the few variables that an interpreter needs to start.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

LAUNCH, ORDERS = "VQRAE_LAUNCH", "VQRAE_ORDERS"  # the launch's mark, and its file, on each node

# Prefixes. Nothing else leaves this machine: an environment has secrets, and the nodes have an
# environment of their own.
FORWARDED = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHON", "LANG", "LC_", "TZ"),
    *("OMP_", "MKL_", "OPENBLAS_", "MALLOC_"),
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "TORCH", "PYTORCH_", "TRITON_"),
    *("DS_", "DEEPSPEED_", "VQRAE_", "HF_HOME", "HF_HUB_", "XDG_CACHE_HOME"),
)
FOR_THE_LAUNCHER = ("PATH", "LD_LIBRARY_PATH", "PYTHON", "DS_ACCELERATOR")
OF_THE_LAUNCHER = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", LAUNCH, ORDERS)  # a rank has its own
SECRET = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY")


class Orders(NamedTuple):
    """The trainer's arguments, the folder that they are relative to, and the environment."""

    folder: str
    arguments: list[str]
    environment: dict[str, str]


def write_orders(path: Path, orders: Orders) -> None:
    """Write a file that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        json.dump(orders._asdict(), file, indent=2)


def read_orders(path: Path) -> Orders:
    """Read what `write_orders` wrote."""
    return Orders(**json.loads(Path(path).read_text()))


def forwarded(environment: Mapping[str, str], more: str = "") -> dict[str, str]:
    """The variables that the ranks get.

    `more` has prefixes beside `FORWARDED`, separated by commas. A name that sounds like a secret
    passes only where `more` has it in full.
    """
    also = tuple(filter(None, more.replace(",", " ").split()))
    chosen = {}
    for name, value in environment.items():
        is_open = name.startswith(FORWARDED + also) and not sounds_secret(name)
        if (is_open or name in also) and name not in OF_THE_LAUNCHER:
            chosen[name] = value
    return chosen


def sounds_secret(name: str) -> bool:
    """Whether a variable is called like a secret."""
    return any(word in name for word in SECRET)


def write_deepspeed_env(path: Path, environment: Mapping[str, str], **own: str) -> None:
    """Write DS_ENV_FILE: what the interpreter on a node needs to start, and `own`.

    No secret: DeepSpeed logs all of it. Raises `ValueError` where a value has more than one line.
    """
    chosen = (n for n in environment if n.startswith(FOR_THE_LAUNCHER) and not sounds_secret(n))
    needed = {name: environment[name] for name in chosen} | own
    for name, value in needed.items():
        if "\n" in value:
            raise ValueError(f"{name} = {value!r} in the environment has more than one line")
    lines = (f"{name}={_for_deepspeed(value)}\n" for name, value in needed.items())
    Path(path).write_text("".join(lines))


def _for_deepspeed(value: str) -> str:
    """Quoted so that it arrives in the remote shell as it is.

    `add_export` of DeepSpeed (deepspeed/launcher/multinode_runner.py) puts double quotes around a
    value with special characters. Two more of them close its pair before ours begins. pdsh makes
    a host's name of %h.
    """
    return f'"{shlex.quote(value).replace("%", "%%")}"'
