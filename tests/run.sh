#!/usr/bin/env bash
# Every test that can run on this machine; what cannot is skipped with its reason.
#   bash tests/run.sh [pytest arguments]
# WORKERS processes take the files in turn, those first that take longest. Each may need 8 GB and
# two cores for a while.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launchers/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
