#!/usr/bin/env bash
# Trains on the nodes of a hostfile, over ssh; run it on one of them or on any machine that reaches
# them and sees the same file system.
#   bash launchers/multinode.sh HOSTFILE CONFIG.yaml DEEPSPEED.json [a.b=value ...]
# A line of HOSTFILE is `NAME slots=GPUS`; the first has rank 0. ssh must need no password, pdsh
# must be installed here. The same command again resumes. Run it in tmux: it ends with its terminal.
#
# Ctrl-C or TERM    all ranks save, and it ends with status 85; once more kills the ranks
# a rank is killed  the job ends on all nodes within GRACE (60 s) and a minute
# a node is lost    noticed within SILENCE (60 s); 20 s later the job has ended on all nodes, on the
#                   lost one too
# status            0 done, 85 stopped, 2 a mistake in what it was given, else failed
set -euo pipefail

PROJECT=${PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}   # at the same path on every node
PYTHON=${PYTHON:-$PROJECT/.venv/bin/python}      # likewise; without spaces: the remote shell splits it
ENV_FILE=${ENV_FILE:-}                           # sourced first: modules, NCCL_*, GLOO_SOCKET_IFNAME ...
export VQRAE_FORWARD=${VQRAE_FORWARD:-}          # more variables for the ranks: A,B_ (orders.py has the list)
export MASTER_ADDR=${MASTER_ADDR:-}              # of the first node; else the first that `hostname -I` says
export MASTER_PORT=${MASTER_PORT:-}              # else one by the run's folder
export DOCTOR=${DOCTOR:-yes}                     # no: do not look at the nodes first
export DOCTOR_SECONDS=${DOCTOR_SECONDS:-}        # that a node has to answer, else 30
export VQRAE_SILENCE_SECONDS=${SILENCE:-60}      # a node that does not answer for so long is lost
export VQRAE_GRACE_SECONDS=${GRACE:-60}          # how long other nodes may go on after one has ended

cd "$PROJECT"
source launchers/site.sh
exec "$PYTHON" -m vqrae_ds.launching.hostfile "$@"
