"""One DeepSpeed launcher on a node of a batch job, and under it the node's ranks.

    srun --ntasks-per-node=1 python -m vqrae_ds.launching.node HOSTS ADDRESS PORT ARGUMENT...

HOSTS is RUN/launch/hosts; the arguments after PORT go to the trainer as they are.

SLURM signals every process of a step. DeepSpeed's front end would die of it; its launcher would
end the ranks one after another, 30 s each, in the midst of their checkpoint. So the signals are
blocked before either starts: processes inherit that, through exec as well. The ranks unblock them
when they are ready to train (`StopRequest.catch_signals`), save together and leave; then their
launchers leave by themselves.
Where one rank has failed the others are ended from here, all at once.

Exit status: that of DeepSpeed's launcher, which is that of the first rank that failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from vqrae_ds.launching.orders import LAUNCH
from vqrae_ds.launching.processes import PATIENCE, Siblings
from vqrae_ds.stopping import hold_signals

INTERVAL = 1.0  # seconds between two looks at the ranks


def main() -> None:
    """Run the launcher and end as it ends."""
    hostfile, address, port, *arguments = sys.argv[1:]
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += ["--hostfile", hostfile, "--no_ssh", "--node_rank", os.environ["SLURM_NODEID"]]
    command += ["--master_addr", address, "--master_port", port]
    command += ["--module", "vqrae_ds.train", *arguments]
    hold_signals()
    sys.exit(run(command, Path(hostfile).parent.parent))


def run(command: Sequence[str], run_folder: Path, patience: float = PATIENCE) -> int:
    """Run DeepSpeed's launcher to its end; its exit status, 128 + N where signal N ended it.

    `patience`: seconds that the other ranks have after one has failed.
    """
    mark = uuid.uuid4().hex
    siblings = Siblings(mark, run_folder, patience)
    with subprocess.Popen(command, env={**os.environ, LAUNCH: mark}) as launcher:
        while True:
            try:
                status = launcher.wait(INTERVAL)
            except subprocess.TimeoutExpired:
                siblings.look()
            else:
                return status if status >= 0 else 128 - status


if __name__ == "__main__":
    main()
