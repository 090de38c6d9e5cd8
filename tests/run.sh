#!/usr/bin/env bash
# Every test that can run on this machine; what cannot is skipped with its reason.
#   bash tests/run.sh [pytest arguments]
# WORKERS processes take the files in turn, those first that take longest. Each may need 8 GB for a
# while; many wait for daemons or ranks, so there may be more of them than cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launchers/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
# Threads of several processes that spin for the same cores make a test ten times slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
