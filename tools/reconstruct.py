"""Images -> codes -> images, side by side with the originals in one PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vqrae_ds import VQRAE
from vqrae_ds.command_line import run_tool
from vqrae_ds.data.decode import load_image
from vqrae_ds.evaluation.report import image_grid, save_grid

EXAMPLE = """\
example:
  python tools/reconstruct.py runs/quickstart/inference photo1.jpg photo2.jpg --out grid.png
"""


def main() -> None:
    """Read the command line, reconstruct, write the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of tools/convert_checkpoint.py")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to run (default here: %(default)s)")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here; use cpu")
    model = VQRAE.from_pretrained(args.model).to(args.device)
    size = model.config.image_size
    # Each picture's largest centre square, resized to the side that the model was trained at.
    images_B3HW = torch.stack([load_image(path, image_size=size) for path in args.images])
    with torch.no_grad():
        indices_Bhw = model.encode_to_indices(images_B3HW.to(args.device))
        images_hat_B3HW = model.decode_from_indices(indices_Bhw)
    save_grid(image_grid([images_B3HW, images_hat_B3HW], min_side=256), args.out)
    h, w = indices_Bhw.shape[1:]
    print(f"{args.out}: original | reconstruction from {h} x {w} codes an image")


if __name__ == "__main__":
    run_tool(main)
