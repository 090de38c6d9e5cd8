"""Convert a ZeRO checkpoint of the trainer into safetensors, for stage 2 or for inference.

example:
  python tools/convert_checkpoint.py runs/stage1 runs/stage1/for_stage2 --to stage2 --verify
  python tools/convert_checkpoint.py runs/stage2 runs/model --to inference --dtype bf16 --ema
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.manifest import find_step_folder

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    """Parse the command line, convert, and verify if asked to."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=Path,
        help="step folder; or a run or its checkpoints folder: then its newest complete step",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="new folder for the weights")
    parser.add_argument(
        "--to",
        required=True,
        choices=["stage2", "inference"],
        help="stage2: fp32 masters and the discriminator; inference: the model alone",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="fp32", help="of the parameters, for inference"
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the moving averages of the trained weights instead of the weights",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read OUT back and compare every element"
    )
    args = parser.parse_args()

    checkpoint = find_step_folder(args.checkpoint)
    consolidate(
        checkpoint,
        args.output,
        to=args.to,
        dtype=_DTYPES[args.dtype],
        ema=args.ema,
        progress=True,
    )
    if args.verify:
        verify(checkpoint, args.output, progress=True)
    notes = f"{', moving averages' if args.ema else ''}{', verified' if args.verify else ''}"
    print(f"{args.output}: {checkpoint} for {args.to}{notes}")


if __name__ == "__main__":
    run_tool(main)
