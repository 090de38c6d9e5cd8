"""Convert a ZeRO checkpoint of the trainer into safetensors, for stage 2 or for inference.

example:
  python tools/convert_checkpoint.py runs/stage1 runs/stage1/for_stage2 --to stage2 --verify
  python tools/convert_checkpoint.py runs/stage2 runs/model --to inference --dtype bf16 --ema

A checkpoint that plain DeepSpeed wrote has no checksums; it needs the model's description:
  python tools/convert_checkpoint.py other_run model --to inference --model-config stage1.yaml

exit status: 0 done, 1 the machine failed (a full disk), 2 a mistake or a damaged checkpoint;
except for 0, no OUT is left: with --verify it appears when all of it has been compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.conversion.checkpoint_source import find_checkpoint
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.models.weights import DTYPES


def _parse() -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        type=Path,
        help="step folder; or a run or its checkpoints folder: then its newest complete step; "
        "or a folder with DeepSpeed's `latest`, or of one of its engines",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="new folder for the weights")
    parser.add_argument(
        "--to",
        required=True,
        choices=["stage2", "inference"],
        help="stage2: the masters, in fp32 or as a run with masters in bf16 kept them, and the "
        "discriminator; inference: the model alone",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the parameters, for inference"
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the moving averages of the trained weights instead of the weights",
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="FILE",
        help="for a checkpoint without model_config.json: a recipe (.yaml) or a config.json",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read back what was written, compare every element, and what both models make of an "
        "image",
    )
    return parser.parse_args()


def main() -> None:
    """Parse the command line, convert, and verify if asked to."""
    args = _parse()
    checkpoint = find_checkpoint(args.checkpoint)
    notes = [f"{args.output}: {checkpoint} for {args.to}"]
    if args.ema:
        notes.append("moving averages")

    def check(folder: Path) -> None:
        # Imported here: the model's libraries take longer, and more memory, than a conversion.
        from vqrae_ds.conversion.forward_check import compare_forward

        verify(checkpoint, folder, model_config=args.model_config, progress=True)
        skipped = compare_forward(checkpoint, folder, model_config=args.model_config)
        forward = f"forward pass skipped: {skipped}" if skipped else "forward pass equal"
        notes.append(f"verified: every element once and equal, {forward}")

    consolidate(
        checkpoint,
        args.output,
        to=args.to,
        dtype=DTYPES[args.dtype],
        ema=args.ema,
        model_config=args.model_config,
        check=check if args.verify else None,
        progress=True,
    )
    print(", ".join(notes))


if __name__ == "__main__":
    run_tool(main)
