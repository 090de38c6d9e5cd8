"""The command line of the trainer -> a checked run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vqrae_ds.command_line import OneLineParser
from vqrae_ds.config.data_paths import check_indexes
from vqrae_ds.config.reading import Run, read_run

EXAMPLE = """\
example:
  deepspeed --num_gpus 8 --module vqrae_ds.train \\
      --config ds_configs/internvit_6b/stage1.yaml \\
      --deepspeed_config ds_configs/stage1_zero3.json \\
      run.output_dir=runs/stage1 deepspeed.train_micro_batch_size_per_gpu=8

The same command again resumes from the newest checkpoint. --dry-run prints the resolved run and
stops.
"""


class CommandLine(NamedTuple):
    """What the command line said, with the run that it describes."""

    run: Run
    dry_run: bool


def parse_command_line(argv: Sequence[str] | None = None) -> CommandLine:
    """Parse and check everything. Raises `ValueError` with one line on any mistake of the user.

    A dry run looks for the indexes of the data too; a training finds them as it opens them.
    """
    args = _build_parser().parse_intermixed_args(argv)
    run = read_run(
        Path(args.config),
        Path(args.deepspeed_config),
        overrides=args.overrides,
        world_size=_world_size(args.gpus, args.dry_run),
        allowed_keys=args.allow_untested_key,
    )
    if args.dry_run:
        check_indexes(run.config.data)
    return CommandLine(run, args.dry_run)


def _build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="vqrae_ds.train",
        description="Train a VQRAE tokenizer.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="YAML", help="model, stage, losses, data")
    add("--deepspeed_config", required=True, metavar="JSON", help="batch, optimizer, ZeRO")
    add("--dry-run", action="store_true", help="check and print the resolved run, then stop")
    add("--gpus", type=int, metavar="N", help="number of ranks assumed by --dry-run")
    add(
        "--allow-untested-key",
        action="append",
        default=[],
        metavar="KEY",
        help="let this untested key of the DeepSpeed JSON through (may be repeated)",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    add(
        "overrides",
        nargs="*",
        metavar="a.b=value",
        help="of the YAML; deepspeed.a.b=value of the JSON",
    )
    return parser


def _world_size(gpus: int | None, dry_run: bool) -> int:
    if gpus is None:
        ranks = os.environ.get("WORLD_SIZE", "1")
        if not ranks.isdecimal() or int(ranks) == 0:
            raise ValueError(f"WORLD_SIZE = {ranks!r} in the environment is not a number of ranks")
        return int(ranks)
    if gpus < 1:
        raise ValueError(f"--gpus {gpus} is not a number of ranks: 1 or more")
    if not dry_run:
        raise ValueError(f"--gpus {gpus} is for --dry-run alone; the launcher sets the real number")
    return gpus
