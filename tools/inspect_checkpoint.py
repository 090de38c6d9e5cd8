"""Show what a checkpoint holds, and whether it is whole: step, layout, files, tensors, damage.

CKPT is a step folder, a run (its newest complete step), a folder of tools/convert_checkpoint.py, or
what plain DeepSpeed wrote. Nothing in it is executed, and nothing is written.

example:
  python tools/inspect_checkpoint.py runs/stage1
  python tools/inspect_checkpoint.py runs/stage1/checkpoints/step_00001000 --verify
  python tools/inspect_checkpoint.py runs/model --all --json

exit status: 0 intact, 1 damaged or incomplete, 2 a mistake in the command
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.conversion.inspection import inspect
from vqrae_ds.conversion.inspection_report import as_json, as_text


def main() -> None:
    """Parse the command line, inspect, print; damage is exit status 1."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument(
        "--verify", action="store_true", help="read every byte and compare the checksums"
    )
    parser.add_argument(
        "--all", action="store_true", help="a line for each tensor, not for each kind of block"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor")
    args = parser.parse_args()

    found = inspect(args.checkpoint, verify=args.verify, progress=True)
    if args.json:
        print(as_json(found), end="")
    else:
        print(as_text(found, every_tensor=args.all, verified=args.verify))
    if found.damage:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
