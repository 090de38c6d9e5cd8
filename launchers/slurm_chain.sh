#!/usr/bin/env bash
# Submits both stages as jobs that wait for one another: stage 1 -> weights -> stage 2 -> weights.
#   bash launchers/slurm_chain.sh OUT STAGE1.yaml STAGE1.json STAGE2.yaml STAGE2.json [a.b=value ...]
# The overrides are those of both stages. It writes OUT/stage1, OUT/stage1_weights, OUT/stage2 and
# OUT/inference, and prints the numbers of the jobs.
#
# A job waits until the one before it has COMPLETED: one that is requeued keeps it waiting, however
# often. If one fails, those behind it are cancelled. The same command again goes on where it ended:
# a stage that is done ends at once, weights that are there are not made again. Where a job cannot be
# submitted, those before it are cancelled.
set -euo pipefail

TRAIN_OPTIONS=${TRAIN_OPTIONS:-}       # of sbatch, for the stages: --nodes=8 --comment="a b"
CONVERT_OPTIONS=${CONVERT_OPTIONS:-}   # and between them: --partition=cpu
export PROJECT=${PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}   # on every node

if (($# < 5)); then
    sed -n '3s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out=$1 yaml1=$2 json1=$3 yaml2=$4 json2=$5
shift 5

read_words() {  # read_words ARRAY TEXT: its words; quotes and backslashes are a shell's
    local listed
    listed=$(xargs -r -n1 printf '%s\n' <<<"$2")
    mapfile -t "$1" < <(printf %s "$listed")
}
read_words train "$TRAIN_OPTIONS"
read_words convert "$CONVERT_OPTIONS"
cd "$PROJECT"

yaml() { printf "'%s'" "${1//\'/\'\'}"; }  # yaml TEXT: as a value, whatever characters are in it

jobs=()
submit() {  # submit ARGUMENT...: sbatch behind the last job, if there is one
    local dependency=() job
    ((${#jobs[@]} == 0)) || dependency=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    if ! job=$(sbatch --parsable "${dependency[@]}" "$@"); then
        ((${#jobs[@]} == 0)) || scancel "${jobs[@]}"
        echo "error: the chain is not complete; cancelled: ${jobs[*]:-nothing}" >&2
        exit 1
    fi
    jobs+=("${job%%;*}")
    echo "${jobs[-1]}"
}

submit --job-name=stage1 "${train[@]}" launchers/slurm.sbatch "$yaml1" "$json1" "$@" \
    run.output_dir="$(yaml "$out/stage1")"
submit --job-name=stage1-weights "${convert[@]}" launchers/slurm_convert.sbatch \
    "$out/stage1" "$out/stage1_weights" stage2
submit --job-name=stage2 "${train[@]}" launchers/slurm.sbatch "$yaml2" "$json2" "$@" \
    run.output_dir="$(yaml "$out/stage2")" init.model="$(yaml "$out/stage1_weights")"
submit --job-name=inference "${convert[@]}" launchers/slurm_convert.sbatch \
    "$out/stage2" "$out/inference" inference
