#!/usr/bin/env bash
# The whole main job on real photographs, on one machine, with or without a GPU:
#   stage 1 -> convert -> stage 2 -> convert -> reconstruct
#   bash launchers/quickstart.sh
# Interrupted and run again, it goes on from its last checkpoint (every 200 steps); once finished, it
# trains no more but converts and reports anew, in half a minute.
# Ctrl-C or TERM: the ranks save, and it waits for them.
# To start over: rm -r runs/quickstart
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-runs/quickstart}                     # everything that is written goes here
LPIPS=${LPIPS:-.venv/lpips_vgg16.safetensors}   # real LPIPS weights, fetched once

bash launchers/setup.sh
python=.venv/bin/python                         # not .venv/bin/deepspeed: a space in a path breaks scripts
export PATH="$PWD/.venv/bin:$PATH"              # the launcher looks for ninja there

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=2                                         # two ranks on one CPU are still two real ZeRO-3 ranks
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
elif ((gpus < ranks)); then
    ranks=$gpus
fi
echo "== $ranks ranks on ${gpus/#0/no} GPU(s)"
echo "== note: the tiny encoder is UNTRAINED. This shows the whole system at work, not its quality:"
echo "==       features of a random encoder mean nothing to a language model."

train() {  # train RUN CONFIG JSON [a.b=value ...]
    local run=$1 config=$2 json=$3 port launcher
    shift 3
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "$python" -m deepspeed.launcher.runner --num_gpus "$ranks" --master_addr 127.0.0.1 --master_port "$port" \
        --log_level error --module vqrae_ds.train --config "$config" --deepspeed_config "$json" \
        run.output_dir="$run" data.train="$OUT/data/train" data.validation="$OUT/data/val" \
        losses.perceptual.weights="$LPIPS" "$@" &
    launcher=$!                                 # in the background Ctrl-C does not end it before its ranks
    trap 'stop_training "$run" "$launcher" 130' INT
    trap 'stop_training "$run" "$launcher" 143' TERM
    wait "$launcher"
    trap - INT TERM
}

stop_training() {  # stop_training RUN LAUNCHER STATUS: the ranks save first
    trap '' INT TERM
    echo "== stopping: the ranks save"
    mkdir -p "$1"
    touch "$1/STOP"                             # for a rank that a signal has not reached, or not yet
    wait "$2" || true
    rm -f "$1/STOP"                             # where no rank was left to read it
    echo "== stopped; the same command goes on"
    exit "$3"
}

convert() {  # convert RUN FOLDER stage2|inference
    rm -rf "$2"
    "$python" tools/convert_checkpoint.py "$1" "$2" --to "$3" --verify
}

echo "== data: photographs into tar shards"
"$python" tools/make_lpips_weights.py "$LPIPS"
for split in train val; do
    rm -rf "$OUT/data/$split"
    "$python" tools/make_shards.py "tests/data/photos/$split" "$OUT/data/$split"
done

echo "== stage 1: frozen encoder; codebook projection and decoder learn"
train "$OUT/stage1" ds_configs/tiny/stage1.yaml ds_configs/stage1_cpu.json
echo "== stage 1 -> weights that stage 2 starts from"
convert "$OUT/stage1" "$OUT/stage1_weights" stage2

echo "== stage 2: the encoder learns too, held by its frozen first self"
train "$OUT/stage2" ds_configs/tiny/stage2.yaml ds_configs/stage2_cpu.json init.model="$OUT/stage1_weights"
echo "== stage 2 -> inference weights"
convert "$OUT/stage2" "$OUT/inference" inference

"$python" tools/quickstart_report.py "$OUT" tests/data/photos/val
echo
echo "reconstructions   $OUT/reconstructions.png   (original | stage 1 | stage 2)"
echo "summary           $OUT/summary.json"
echo "model             $OUT/inference             VQRAE.from_pretrained(\"$OUT/inference\")"
echo "curves            .venv/bin/tensorboard --logdir $OUT"
echo "your own picture  .venv/bin/python tools/reconstruct.py $OUT/inference IMAGE --out grid.png"
