#!/usr/bin/env bash
# Makes .venv with the package and what it needs; does nothing if that is done already.
#   bash launchers/setup.sh [EXTRA]        EXTRA: dev, gpu
# PYTHON names the interpreter to build on (3.10 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

EXTRA=${1:-}
PYTHON=${PYTHON:-python3}
READY=.venv/.ready${EXTRA:+-$EXTRA}

wanted=$(cat requirements.txt pyproject.toml <(pwd) | cksum)   # a moved checkout is set up anew
if [[ -f $READY && $(cat "$READY") == "$wanted" ]]; then
    exit 0
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $PYTHON is older than Python 3.10; set PYTHON=/path/to/python3.10 or newer" >&2
    exit 2
fi
echo "setting up .venv (once; about 6 GB, most of it torch)"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then   # none yet, or only half of one
    "$PYTHON" -m venv --clear .venv || {
        echo "error: $PYTHON cannot make a virtual environment (Debian: apt install python3-venv)" >&2
        exit 2
    }
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
if [[ $EXTRA == gpu ]]; then
    "${pip[@]}" --editable .
    "${pip[@]}" --no-build-isolation --editable ".[gpu]"   # flash-attn builds against the torch above
else
    "${pip[@]}" --editable ".${EXTRA:+[$EXTRA]}"
fi
echo "$wanted" >"$READY"
echo ".venv is ready: source .venv/bin/activate"
