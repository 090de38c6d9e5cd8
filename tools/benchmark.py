"""Measure the trainer against a peer, both in one run on this machine.

  step        a training step against a bare DeepSpeed loop of the same model, losses and data:
              time, collectives, waits for the device (2 ranks, about 5 minutes on 2 CPU cores)
  checkpoint  how long training stands still for a save, in one step and in two, against
              DeepSpeed's save_checkpoint of the same engines (2 ranks, about 2 minutes)
  convert     tools/convert_checkpoint.py against DeepSpeed's zero_to_fp32 on the same ZeRO-3
              checkpoint of 8 ranks: processor time, memory (about 12 minutes and 6 GB of disk)
  simvq       SimVQ against vector-quantize-pytorch's and the textbook's, forward and backward on
              the CPU: time, memory, the right codes (about 6 minutes)
  kernel      SimVQ's search on a GPU, 16384 tokens and codes of 1536 dimensions, against a matrix
              product of that shape and a search that keeps the distances: time, memory
  mfu         training steps of one rank at 6B width, as deep as fits on this GPU, both stages:
              seconds, TFLOP/s, share of the peak, memory against the plan; with files of your own
              on a CPU too
  data        decoding photographs, and resuming in the middle of a million samples, against
              webdataset with Pillow (one core, about 3 minutes)
  tokenize    tools/tokenize_shards.py against a loop of webdataset, Pillow and the model, a whole
              job of each with the same model and batches (about 2 minutes)

examples:
  python tools/benchmark.py step
  python tools/benchmark.py step --cases stage2 --pairs 200 --json step.json
  python tools/benchmark.py checkpoint --folder /lustre/me --local-dir /nvme/me
  python tools/benchmark.py convert --parameters 5e8 --folder /scratch
  python tools/benchmark.py simvq --rounds 15
  python tools/benchmark.py kernel
  python tools/benchmark.py mfu losses.perceptual.weights=.venv/lpips_vgg16.safetensors
  python tools/benchmark.py mfu --config ds_configs/tiny/stage1.yaml \\
      --deepspeed_config ds_configs/stage1_cpu.json --peak-tflops 0.1 --accumulation 2
  python tools/benchmark.py tokenize --model runs/quickstart/inference --batch-size 32

Each row has ours, the peer's, and ratio = ours / peer; where the peer is 0 there is no ratio.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from vqrae_ds.benchmarks.options import make_parser
from vqrae_ds.benchmarks.table import Report, as_json, as_text
from vqrae_ds.command_line import run_tool

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "tests" / "data" / "photos"


def main() -> None:
    """Parse the command line, run one benchmark, print its rows and write them where asked."""
    args = make_parser(__doc__, PHOTOS).parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: {args.json.parent} is no folder")
    if getattr(args, "rounds", 2) < 2:
        raise ValueError(f"--rounds {args.rounds} has no spread: 2 or more")
    if getattr(args, "folder", None) is not None and not args.folder.is_dir():
        raise ValueError(f"--folder {args.folder} is no folder: name one on the disk to measure")
    run_one = {
        "step": run_step,
        "checkpoint": run_checkpoint,
        "convert": run_convert,
        "simvq": run_simvq,
        "kernel": run_kernel,
        "mfu": run_mfu,
        "data": run_data,
        "tokenize": run_tokenize,
    }
    report = run_one[args.name](args)
    print(as_text(report))
    for name, details in report.details.items():
        print(f"{name}: {json.dumps(details)}")
    if args.json is not None:
        args.json.write_text(as_json(report))


def run_step(args: argparse.Namespace) -> Report:
    """The benchmark `step`."""
    if args.micro_batch is not None and args.micro_batch < 1:
        raise ValueError(f"--micro-batch {args.micro_batch} is no number of images: 1 or more")
    if args.pairs < 2:
        raise ValueError(f"--pairs {args.pairs} has no spread: 2 or more")
    from vqrae_ds.benchmarks.step import Trainer, measure_step
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    return measure_step(Trainer(prepare, train), args.cases, args.pairs, args.micro_batch)


def run_checkpoint(args: argparse.Namespace) -> Report:
    """The benchmark `checkpoint`."""
    if not args.local_dir.is_dir():
        raise ValueError(f"--local-dir {args.local_dir} is no folder: name one on the node's disk")
    from vqrae_ds.benchmarks.checkpoint import measure_checkpoint
    from vqrae_ds.preparation import prepare

    return measure_checkpoint(prepare, args.folder, args.local_dir, args.rounds)


def run_convert(args: argparse.Namespace) -> Report:
    """The benchmark `convert`."""
    if min(args.parameters) < 1e6:
        raise ValueError(f"--parameters {min(args.parameters):g} is not a model: 1e6 or more")
    from vqrae_ds.benchmarks.convert import measure_convert

    tool = Path(__file__).with_name("convert_checkpoint.py")
    return measure_convert(tool, args.parameters, args.folder, args.rounds)


def run_simvq(args: argparse.Namespace) -> Report:
    """The benchmark `simvq`."""
    from vqrae_ds.benchmarks.simvq import measure_simvq

    return measure_simvq(args.rounds)


def run_kernel(args: argparse.Namespace) -> Report:
    """The benchmark `kernel`."""
    from vqrae_ds.benchmarks.kernel import measure_kernel

    return measure_kernel(args.rounds)


def run_mfu(args: argparse.Namespace) -> Report:
    """The benchmark `mfu`."""
    least = {"encoder_blocks": 1, "decoder_blocks": 1, "accumulation": 1, "steps": 2}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name.replace('_', '-')} {value} is too small: {bound} or more")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise ValueError(f"--peak-tflops {args.peak_tflops:g} is no peak in TFLOP/s: above 0")
    if (args.config is None) != (args.deepspeed_config is None):
        raise ValueError("--config and --deepspeed_config belong together: give both, or none")
    from vqrae_ds.benchmarks.launch import require_gpu
    from vqrae_ds.benchmarks.mfu import Options, measure_mfu
    from vqrae_ds.benchmarks.mfu_runs import Depth, Recipe
    from vqrae_ds.benchmarks.step import Trainer
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    files = [(args.config, args.deepspeed_config)]
    if args.config is None:
        require_gpu("mfu at 6B width", "with --config and --deepspeed_config it runs on a CPU")
        folder = ROOT / "ds_configs"
        files = [
            (folder / f"internvit_6b/stage{stage}.yaml", folder / f"stage{stage}_zero3.json")
            for stage in (1, 2)
        ]
    recipes = [Recipe(config, deepspeed, args.overrides) for config, deepspeed in files]
    depth = Depth(args.encoder_blocks, args.decoder_blocks)
    options = Options(
        depth, args.accumulation, args.steps, args.peak_tflops, args.photos, args.folder
    )
    return measure_mfu(Trainer(prepare, train), recipes, options)


def run_data(args: argparse.Namespace) -> Report:
    """The benchmark `data`."""
    if args.position < 100:
        raise ValueError(f"--position {args.position} is too near to the start: 100 or more")
    if not 1 <= args.peer_resume_rounds <= args.rounds:
        raise ValueError(
            f"--peer-resume-rounds {args.peer_resume_rounds} is not from 1 to the {args.rounds} of "
            "--rounds"
        )
    from vqrae_ds.benchmarks.data import measure_data

    return measure_data(
        args.photos, args.folder, args.position, args.rounds, args.peer_resume_rounds
    )


def run_tokenize(args: argparse.Namespace) -> Report:
    """The benchmark `tokenize`."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} is no number of images: 1 or more")
    if args.model is not None and not args.model.is_dir():
        raise ValueError(f"--model {args.model} is no folder")
    from vqrae_ds.benchmarks.tokenize import measure_tokenize

    places = (args.photos, args.model, ROOT / "ds_configs" / "tiny" / "encoder", args.folder)
    return measure_tokenize(*places, args.batch_size, args.rounds)


if __name__ == "__main__":
    run_tool(main)
