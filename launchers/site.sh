# Sourced by the scripts beside it, in PROJECT: the environment of the site, and the PATH of PYTHON.
# ENV_FILE may do what an interactive shell bears and `set -eu` does not: modules and conda read
# variables that are not set, and the last line may be a test that fails.
if [[ -n $ENV_FILE ]]; then
    if [[ ! -r $ENV_FILE ]]; then
        echo "error: ENV_FILE=$ENV_FILE cannot be read" >&2
        exit 2
    fi
    set +eu
    # shellcheck disable=SC1090
    source "$ENV_FILE"
    set -eu
fi
export PATH="$(dirname "$PYTHON"):$PATH"         # DeepSpeed looks for ninja there
