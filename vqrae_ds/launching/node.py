"""One DeepSpeed launcher on a node of a batch job, and under it the node's ranks.

    srun --ntasks-per-node=1 python -m vqrae_ds.launching.node HOSTS ADDRESS PORT ARGUMENT...

SLURM signals every process of a step. DeepSpeed's front end would die of it; its launcher would
end the ranks one after another, 30 s each, in the midst of their checkpoint. So the signals are
blocked before either starts: processes inherit that, through exec as well. The ranks unblock them
(`StopRequest.catch_signals`), save together and leave; then their launchers leave by themselves.
A launcher still ends its other ranks when one has failed: for that it needs no signal.
"""

from __future__ import annotations

import os
import signal
import sys

from vqrae_ds.stopping import SIGNALS


def main() -> None:
    """Become the launcher; the arguments after the third go to the trainer as they are."""
    hostfile, address, port, *arguments = sys.argv[1:]
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += ["--hostfile", hostfile, "--no_ssh", "--node_rank", os.environ["SLURM_NODEID"]]
    command += ["--master_addr", address, "--master_port", port]
    command += ["--module", "vqrae_ds.train", *arguments]
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
