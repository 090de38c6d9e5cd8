"""A rank that DeepSpeed's launcher starts over ssh: takes its orders and becomes the trainer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vqrae_ds.launching.orders import ORDERS, read_orders


def main() -> None:
    """Become the trainer, with arguments, folder and environment from the file of the launch."""
    orders = read_orders(Path(os.environ[ORDERS]))
    os.chdir(orders.folder)
    command = [sys.executable, "-u", "-m", "vqrae_ds.train", *sys.argv[1:], *orders.arguments]
    os.execve(sys.executable, command, {**os.environ, **orders.environment})


if __name__ == "__main__":
    main()
