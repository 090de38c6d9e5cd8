"""Measure the trainer against a peer, both in one run on this machine.

  step   a training step against a bare DeepSpeed loop of the same model, losses and data:
         time, collectives, waits for the device (2 ranks, about 5 minutes on 2 CPU cores)

examples:
  python tools/benchmark.py step
  python tools/benchmark.py step --cases stage2 --pairs 200 --json step.json

Each row has ours, the peer's, and ratio = ours / peer; where the peer is 0 there is no ratio.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vqrae_ds.benchmarks.table import Report, as_json, as_text
from vqrae_ds.command_line import OneLineParser, run_tool


def main() -> None:
    """Parse the command line, run one benchmark, print its rows and write them where asked."""
    help_of_all = {
        "description": __doc__,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = OneLineParser(**help_of_all)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    step = names.add_parser("step", **help_of_all)
    cases = ("stage1_gan", "stage2")
    step.add_argument("--cases", nargs="+", choices=cases, default=cases, help="default: both")
    step.add_argument(
        "--pairs",
        type=int,
        default=100,
        metavar="N",
        help="timed blocks of each loop (default: %(default)s)",
    )
    step.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: {args.json.parent} is no folder")

    if args.name == "step":
        report = run_step(args)
    print(as_text(report))
    for name, details in report.details.items():
        print(f"{name}: {json.dumps(details)}")
    if args.json is not None:
        args.json.write_text(as_json(report))


def run_step(args: argparse.Namespace) -> Report:
    """The benchmark `step`."""
    if args.pairs < 2:
        raise ValueError(f"--pairs {args.pairs} has no spread: 2 or more")
    from vqrae_ds.benchmarks.step import Trainer, measure_step
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    return measure_step(Trainer(prepare, train), args.cases, args.pairs)


if __name__ == "__main__":
    run_tool(main)
