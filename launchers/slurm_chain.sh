#!/usr/bin/env bash
# Submits both stages as jobs that wait for one another: stage 1 -> weights -> stage 2 -> weights.
#   bash launchers/slurm_chain.sh OUT STAGE1.yaml STAGE1.json STAGE2.yaml STAGE2.json [a.b=value ...]
# The overrides are those of both stages. It writes OUT/stage1, OUT/stage1_weights, OUT/stage2 and
# OUT/inference, and prints the numbers of the jobs.
#
# A job waits until the one before it has COMPLETED: one that is requeued keeps it waiting, however
# often. If one fails, those behind it are cancelled. The same command again goes on where it ended:
# a stage that is done ends at once, weights that are there are not made again.
set -euo pipefail

TRAIN_OPTIONS=${TRAIN_OPTIONS:-}       # of sbatch, for the stages: --nodes=8 --partition=gpu
CONVERT_OPTIONS=${CONVERT_OPTIONS:-}   # and between them: --partition=cpu
export PROJECT=${PROJECT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}   # on every node

if (($# < 5)); then
    sed -n '3s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out=$1 yaml1=$2 json1=$3 yaml2=$4 json2=$5
shift 5
read -ra train <<<"$TRAIN_OPTIONS"
read -ra convert <<<"$CONVERT_OPTIONS"
cd "$PROJECT"

submit() {  # submit ARGUMENT...: sbatch behind the last job, if there is one
    local dependency=()
    [[ -z ${last:-} ]] || dependency=(--dependency="afterok:$last" --kill-on-invalid-dep=yes)
    last=$(sbatch --parsable "${dependency[@]}" "$@")
    last=${last%%;*}
    echo "$last"
}

submit --job-name=stage1 "${train[@]}" launchers/slurm.sbatch "$yaml1" "$json1" "$@" \
    run.output_dir="$out/stage1"
submit --job-name=stage1-weights "${convert[@]}" launchers/slurm_convert.sbatch \
    "$out/stage1" "$out/stage1_weights" stage2
submit --job-name=stage2 "${train[@]}" launchers/slurm.sbatch "$yaml2" "$json2" "$@" \
    run.output_dir="$out/stage2" init.model="$out/stage1_weights"
submit --job-name=inference "${convert[@]}" launchers/slurm_convert.sbatch \
    "$out/stage2" "$out/inference" inference
