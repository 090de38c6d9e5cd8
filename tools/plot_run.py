"""Redraw the curves of one or several runs as one picture, without TensorBoard."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.evaluation.curves import read_curves, read_tensorboard
from vqrae_ds.evaluation.plot import plot_runs

EXAMPLE = """\
example:
  python tools/plot_run.py runs/quickstart/stage1 --out curves.png
  python tools/plot_run.py runs/a runs/b --out compared.png
"""


def main() -> None:
    """Read the command line and the runs, draw, write."""
    parser = OneLineParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="picture to write: png, pdf or svg")
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="read TensorBoard's event files instead of metrics.jsonl, which hold the same",
    )
    args = parser.parse_args()
    read = read_tensorboard if args.tensorboard else read_curves
    runs = {str(folder): read(folder) for folder in args.runs}
    plot_runs(runs, args.out)
    last = max(max(curve.steps) for run in runs.values() for curve in run.curves.values())
    print(f"{args.out}: {len(runs)} run(s) up to step {last}")


if __name__ == "__main__":
    run_tool(main)
