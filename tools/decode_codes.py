"""Code shards -> images: what a folder of tools/tokenize_shards.py looks like.

examples:
  python tools/decode_codes.py runs/model codes/train pictures --first 0 --count 64
  python tools/decode_codes.py runs/model codes/train pictures --count 8 --dtype fp32

OUT gets 000000000.png and so on, numbered through all files of codes, and keys.json with the key
of each number; keys never become names of files. The images are those that MODEL makes of the
codes, rounded to 8 bits: with the same batches and --dtype bit for bit those of a direct
reconstruction. By default the batches are those that the codes were made in. MODEL must be the one
that made them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool


def main() -> None:
    """Read the command line, decode, say how many."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("codes", metavar="CODES", type=Path)
    parser.add_argument("output", metavar="OUT", type=Path, help="folder, new or empty")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--count", type=int, metavar="N", help="default: all from --first on")
    parser.add_argument("--batch-size", type=int, default=0, metavar="N", help="see above")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: that of the codes")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU, if there is one")
    args = parser.parse_args()
    for name in ("first", "batch_size", "count"):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is below 0")

    from vqrae_ds.device import choose_device
    from vqrae_ds.tokenizing.decoding import write_images
    from vqrae_ds.tokenizing.job import check_model, read_job
    from vqrae_ds.tokenizing.model import load_for_decoding

    job = read_job(args.codes)
    check_model(args.model, args.codes, job)
    decode = load_for_decoding(args.model, choose_device(args.device), args.dtype or job.dtype)
    end = None if args.count is None else args.first + args.count
    number = write_images(
        args.codes,
        decode,
        args.output,
        first=args.first,
        end=end,
        batch_size=args.batch_size,
    )
    print(f"{args.output}: {number} images, their keys in keys.json")


if __name__ == "__main__":
    run_tool(main)
