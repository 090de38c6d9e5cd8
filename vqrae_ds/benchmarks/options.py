"""The options of each benchmark, as tools/benchmark.py takes them; imports no torch."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vqrae_ds.command_line import OneLineParser

PHOTOGRAPHED = ("mfu", "data", "tokenize")  # they read images


def make_parser(description: str, photos: Path) -> OneLineParser:
    """The command line, a subcommand a benchmark; all have the same help.

    `photos` is the folder of photographs where none is given.
    """
    help_of_all = {
        "description": description,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = OneLineParser(**help_of_all)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    add_options = {
        "step": add_step_options,
        "checkpoint": add_checkpoint_options,
        "convert": add_convert_options,
        "simvq": add_simvq_options,
        "kernel": add_kernel_options,
        "mfu": add_mfu_options,
        "data": add_data_options,
        "tokenize": add_tokenize_options,
    }
    for name, add in add_options.items():
        parser_of_one = names.add_parser(name, **help_of_all)
        add(parser_of_one)
        if name in PHOTOGRAPHED:
            parser_of_one.add_argument(
                "--photos", type=Path, default=photos, metavar="DIR", help="of photographs"
            )
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
    _add_rounds(checkpoint, 7, "saves of each kind")
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
    _add_rounds(convert, 5, "conversions of each size by each side")
    _add_folder(convert, "the files")


def add_simvq_options(simvq: argparse.ArgumentParser) -> None:
    """Of `run_simvq`."""
    _add_rounds(simvq, 7, "timed steps of each implementation")


def add_kernel_options(kernel: argparse.ArgumentParser) -> None:
    """Of `run_kernel`."""
    _add_rounds(kernel, 20, "timed calls of each search")


def add_mfu_options(mfu: argparse.ArgumentParser) -> None:
    """Of `run_mfu`."""
    add = mfu.add_argument
    recipes = "default: both stages of ds_configs/internvit_6b"
    add("--config", type=Path, metavar="YAML", help=f"as for the trainer; {recipes}")
    recipes = "default: ds_configs/stage1_zero3.json, stage2_zero3.json"
    add("--deepspeed_config", type=Path, metavar="JSON", help=f"as for the trainer; {recipes}")
    for part in ("encoder", "decoder"):
        blocks = "default: as many as the plan says fit"
        add(f"--{part}-blocks", type=int, metavar="N", help=f"{blocks}, at most the recipe's")
    batches = "micro batches a step; those of 6B on 8 GPUs by default: %(default)s"
    add("--accumulation", type=int, default=64, metavar="N", help=batches)
    add("--steps", type=int, default=5, metavar="N", help="timed (default: %(default)s)")
    peak = "of the machine at the run's precision; default: monitor.peak_tflops, or by its name"
    add("--peak-tflops", type=float, metavar="TFLOP/S", help=peak)
    _add_folder(mfu, "frozen weights and, of stage 2, first weights, 4 bytes a parameter")
    add("overrides", nargs="*", metavar="a.b=value", help="as for the trainer")


def add_data_options(data: argparse.ArgumentParser) -> None:
    """Of `run_data`."""
    add = data.add_argument
    _add_folder(data, "the shards")
    position = "sample to resume at (default: %(default)s)"
    add("--position", type=int, default=1_000_000, metavar="N", help=position)
    _add_rounds(data, 5, "of each")
    peer = "of these, how many times the peer reads up to the position (default: once)"
    add("--peer-resume-rounds", type=int, default=1, metavar="N", help=peer)


def add_tokenize_options(tokenize: argparse.ArgumentParser) -> None:
    """Of `run_tokenize`."""
    add = tokenize.add_argument
    _add_folder(tokenize, "shards and codes")
    add("--model", type=Path, metavar="DIR", help="inference folder (default: small and random)")
    add("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    _add_rounds(tokenize, 5, "of each")


def _add_rounds(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    what = f"{what} (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=default, metavar="N", help=what)


def _add_folder(parser: argparse.ArgumentParser, what: str) -> None:
    what = f"where to make {what}, and remove all of it"
    parser.add_argument("--folder", type=Path, metavar="DIR", help=what)
