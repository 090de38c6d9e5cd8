"""Images -> codes -> images, side by side with the originals in one PNG."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch

from vqrae_ds import VQRAE
from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.data.fit import Fit, load_fitted, on_one_canvas
from vqrae_ds.evaluation.report import image_grid, save_grid

EXAMPLE = """\
example:
  python tools/reconstruct.py runs/quickstart/inference photo1.jpg photo2.jpg --out grid.png
  python tools/reconstruct.py runs/quickstart/inference wide.jpg --fit pad --size 128 --out wide.png

A token covers a square of q x q pixels, so both sides of an image must be multiples of q.
  --fit crop    the largest centre square, resized to --size (default: the size trained at)
  --fit resize  the whole picture, each side resized to the nearest multiple
  --fit pad     the whole picture, padded to the next multiple; the padding is cut off again
For resize and pad --size is what the short side is brought to first (default: as it is).
"""


def main() -> None:
    """Read the command line, reconstruct, write the grid."""
    parser = OneLineParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of tools/convert_checkpoint.py")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--fit", choices=get_args(Fit), default="crop", help="see below")
    parser.add_argument("--size", type=int, help="pixels, see below")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to run (default here: %(default)s)")
    args = parser.parse_args()
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device} is neither cpu nor cuda")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here; use cpu")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size} is not a number of pixels")
    model = VQRAE.from_pretrained(args.model).to(args.device)
    size = args.size or (model.config.image_size if args.fit == "crop" else None)
    originals, reconstructions, grids = [], [], []
    for path in args.images:
        fitted = load_fitted(path, args.fit, multiple=model.config.output_patch_size, size=size)
        image_13HW = fitted.image_3HW[None].to(args.device)
        with torch.no_grad():
            indices_1hw = model.encode_to_indices(image_13HW)
            images_hat_13HW = model.decode_from_indices(indices_1hw)
        for column, image in ((originals, image_13HW), (reconstructions, images_hat_13HW)):
            column.append(image[0, :, : fitted.height, : fitted.width].cpu())
        grids.append(tuple(indices_1hw.shape[1:]))
    columns = [on_one_canvas(originals), on_one_canvas(reconstructions)]
    save_grid(image_grid(columns, min_side=256), args.out)
    sizes = ", ".join(f"{h} x {w}" for h, w in dict.fromkeys(grids))
    print(f"{args.out}: original | reconstruction from {sizes} codes an image")


if __name__ == "__main__":
    run_tool(main)
