"""Measure the trainer against a peer, both in one run on this machine.

  step        a training step against a bare DeepSpeed loop of the same model, losses and data:
              time, collectives, waits for the device (2 ranks, about 5 minutes on 2 CPU cores)
  checkpoint  how long training stands still for a save, in one step and in two, against
              DeepSpeed's save_checkpoint of the same engines (2 ranks, about 2 minutes)
  convert     tools/convert_checkpoint.py against DeepSpeed's zero_to_fp32 on the same ZeRO-3
              checkpoint of 8 ranks: processor time, memory (about 3 minutes and 6 GB of disk)
  simvq       SimVQ against vector-quantize-pytorch's and the textbook's, forward and backward on
              the CPU: time, memory, the right codes; on a GPU the kernel (about 6 minutes)
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
  python tools/benchmark.py tokenize --model runs/quickstart/inference --batch-size 32

Each row has ours, the peer's, and ratio = ours / peer; where the peer is 0 there is no ratio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from vqrae_ds.benchmarks.table import Report, as_json, as_text
from vqrae_ds.command_line import OneLineParser, run_tool


def main() -> None:
    """Parse the command line, run one benchmark, print its rows and write them where asked."""
    args = make_parser().parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: {args.json.parent} is no folder")
    run_one = {
        "step": run_step,
        "checkpoint": run_checkpoint,
        "convert": run_convert,
        "simvq": run_simvq,
        "data": run_data,
        "tokenize": run_tokenize,
    }
    report = run_one[args.name](args)
    print(as_text(report))
    for name, details in report.details.items():
        print(f"{name}: {json.dumps(details)}")
    if args.json is not None:
        args.json.write_text(as_json(report))


def make_parser() -> OneLineParser:
    """The command line, a subcommand a benchmark."""
    help_of_all = {
        "description": __doc__,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = OneLineParser(**help_of_all)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    add_options = {
        "step": add_step_options,
        "checkpoint": add_checkpoint_options,
        "convert": add_convert_options,
        "simvq": add_simvq_options,
        "data": add_data_options,
        "tokenize": add_tokenize_options,
    }
    for name, add in add_options.items():
        parser_of_one = names.add_parser(name, **help_of_all)
        add(parser_of_one)
        parser_of_one.add_argument(
            "--json", type=Path, metavar="FILE", help="write the rows here too"
        )
    return parser


def add_step_options(step: argparse.ArgumentParser) -> None:
    """Of `run_step`."""
    cases = ("stage1_gan", "stage2")
    step.add_argument("--cases", nargs="+", choices=cases, default=cases, help="default: both")
    step.add_argument(
        "--pairs",
        type=int,
        default=100,
        metavar="N",
        help="timed blocks of each loop (default: %(default)s)",
    )
    step.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="images a rank and step: how long a step is (default: 8 on CPUs, 64 on GPUs)",
    )


def add_checkpoint_options(checkpoint: argparse.ArgumentParser) -> None:
    """Of `run_checkpoint`."""
    checkpoint.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="saves of each kind (default: %(default)s)",
    )
    temporary = Path(tempfile.gettempdir())
    for name, what in (("--folder", "the run's folder"), ("--local-dir", "the node's own disk")):
        checkpoint.add_argument(
            name,
            type=Path,
            default=temporary,
            metavar="DIR",
            help=f"where {what} is made (default: %(default)s)",
        )


def add_convert_options(convert: argparse.ArgumentParser) -> None:
    """Of `run_convert`."""
    convert.add_argument(
        "--parameters",
        nargs="+",
        type=float,
        default=(125e6, 250e6, 500e6),
        metavar="N",
        help="sizes of the models, about (default: 125e6 250e6 500e6)",
    )
    convert.add_argument("--folder", type=Path, help="where to make the files, and remove them")


def add_simvq_options(simvq: argparse.ArgumentParser) -> None:
    """Of `run_simvq`."""
    simvq.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="timed steps of each implementation (default: %(default)s)",
    )


def add_data_options(data: argparse.ArgumentParser) -> None:
    """Of `run_data`."""
    photos = Path(__file__).parents[1] / "tests" / "data" / "photos"
    data.add_argument("--photos", type=Path, default=photos, metavar="DIR", help="of photographs")
    data.add_argument("--folder", type=Path, help="where to make the shards, and remove them")
    data.add_argument(
        "--position",
        type=int,
        default=1_000_000,
        metavar="N",
        help="sample to resume at (default: %(default)s)",
    )
    data.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="of each (default: %(default)s)"
    )


def add_tokenize_options(tokenize: argparse.ArgumentParser) -> None:
    """Of `run_tokenize`."""
    photos = Path(__file__).parents[1] / "tests" / "data" / "photos"
    add = tokenize.add_argument
    add("--photos", type=Path, default=photos, metavar="DIR", help="of photographs")
    add("--folder", type=Path, help="where to make shards and codes, and remove them")
    add("--model", type=Path, metavar="DIR", help="inference folder (default: small and random)")
    add("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="of each (default: %(default)s)")


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
    if args.rounds < 2:
        raise ValueError(f"--rounds {args.rounds} has no spread: 2 or more")
    for folder in (args.folder, args.local_dir):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: name one on the disk to measure")
    from vqrae_ds.benchmarks.checkpoint import measure_checkpoint
    from vqrae_ds.preparation import prepare

    return measure_checkpoint(prepare, args.folder, args.local_dir, args.rounds)


def run_convert(args: argparse.Namespace) -> Report:
    """The benchmark `convert`."""
    if min(args.parameters) < 1e6:
        raise ValueError(f"--parameters {min(args.parameters):g} is not a model: 1e6 or more")
    if args.folder is not None and not args.folder.is_dir():
        raise ValueError(f"--folder {args.folder} is no folder")
    from vqrae_ds.benchmarks.convert import measure_convert

    tool = Path(__file__).with_name("convert_checkpoint.py")
    return measure_convert(tool, args.parameters, args.folder)


def run_simvq(args: argparse.Namespace) -> Report:
    """The benchmark `simvq`."""
    if args.rounds < 2:
        raise ValueError(f"--rounds {args.rounds} has no spread: 2 or more")
    from vqrae_ds.benchmarks.simvq import measure_simvq

    return measure_simvq(args.rounds)


def run_data(args: argparse.Namespace) -> Report:
    """The benchmark `data`."""
    if args.rounds < 1 or args.position < 100:
        raise ValueError(f"--rounds {args.rounds} --position {args.position}: 1, and 100, or more")
    if args.folder is not None and not args.folder.is_dir():
        raise ValueError(f"--folder {args.folder} is no folder")
    from vqrae_ds.benchmarks.data import measure_data

    return measure_data(args.photos, args.folder, args.position, args.rounds)


def run_tokenize(args: argparse.Namespace) -> Report:
    """The benchmark `tokenize`."""
    if args.rounds < 1 or args.batch_size < 1:
        raise ValueError(f"--rounds {args.rounds} --batch-size {args.batch_size}: 1 or more")
    for name in ("folder", "model"):
        if (path := getattr(args, name)) is not None and not path.is_dir():
            raise ValueError(f"--{name} {path} is no folder")
    from vqrae_ds.benchmarks.tokenize import measure_tokenize

    encoder = Path(__file__).parents[1] / "ds_configs" / "tiny" / "encoder"
    places = (args.photos, args.model, encoder, args.folder)
    return measure_tokenize(*places, args.batch_size, args.rounds)


if __name__ == "__main__":
    run_tool(main)
