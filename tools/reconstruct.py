"""Images -> codes -> images, side by side with the originals in one PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool

EXAMPLE = """\
examples:
  python tools/reconstruct.py runs/quickstart/inference photo1.jpg photo2.jpg --out grid.png
  python tools/reconstruct.py runs/quickstart/inference wide.jpg --fit pad --size 128 --out wide.png
  python tools/reconstruct.py MODEL my_photos --out grid.png --json codes.json --each decoded \\
      --show original reconstruction error codes

A token covers a square of q x q pixels, so both sides of an image must be multiples of q.
  --fit crop    the largest centre square, resized to --size (default: the size trained at)
  --fit resize  the whole picture, each side resized to the nearest multiple
  --fit pad     the whole picture, padded to the next multiple; the padding is cut off again
For resize and pad --size is what the short side is brought to first (default: as it is).
Resizing is bicubic with antialiasing. Reconstructions are rounded to 8 bit.

  --show        the columns of the grid, in this order. error: four times the mean error of the
                channels, white from a quarter of the range on. codes: a colour a code, the same one
                in every picture
  --json        a list with an entry an image: its sides in pixels after --fit, PSNR in dB, that of
                its mean colour, SSIM, and its codes, row by row
  --each        each reconstruction as a PNG of its own: 00000.png, ... in the order of --json
"""
FITS, VERSIONS = ("crop", "resize", "pad"), ("original", "reconstruction", "error", "codes")


def main() -> None:
    """Read the command line, reconstruct, write what was asked for."""
    args = parse_arguments()
    paths = image_paths(args.images)
    for folder in (args.out.parent, args.each):  # now, and not after the work
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    # Imported here, so that --help and mistakes do not wait for torch.
    from vqrae_ds.data.fit import on_one_canvas
    from vqrae_ds.device import choose_device
    from vqrae_ds.evaluation.instruments import load_model
    from vqrae_ds.evaluation.report import image_grid, save_grid
    from vqrae_ds.evaluation.single_image import reconstruct_file
    from vqrae_ds.manifest import write_json_atomically

    model = load_model(args.model, None, choose_device(args.device))
    results = [reconstruct_file(model, path, args.fit, args.size) for path in paths]
    columns = [on_one_canvas([result.version(name) for result in results]) for name in args.show]
    save_grid(image_grid(columns, min_side=256), args.out)
    for number, result in enumerate(results):
        if args.each is not None:
            save_grid(result.reconstruction_3HW, args.each / f"{number:05d}.png")
    if args.json is not None:
        write_json_atomically(args.json, [result.as_json() for result in results])
    grids = dict.fromkeys(tuple(result.indices_hw.shape) for result in results)
    sizes = ", ".join(f"{h} x {w}" for h, w in grids)
    print(f"{args.out}: {' | '.join(args.show)} from {sizes} codes an image")
    for result in results:
        print(f"{result.path}: PSNR {result.figures['psnr']:.2f} dB")


def parse_arguments() -> argparse.Namespace:
    """Raises `ValueError` for a mistake that can be seen without opening an image."""
    parser = OneLineParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of tools/convert_checkpoint.py")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="files, and folders of them")
    add("--out", type=Path, required=True, metavar="PNG", help="the grid, a row an image")
    add("--fit", choices=FITS, default="crop", help="see below (default: %(default)s)")
    add("--size", type=int, metavar="PX", help="see below")
    add("--show", choices=VERSIONS, nargs="+", default=list(VERSIONS[:2]), metavar="COLUMN",
        help=f"of {', '.join(VERSIONS)} (default: the first two)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="figures and codes, see below")
    add("--each", type=Path, metavar="DIR", help="see below")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    args = parser.parse_args()
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size} is not a number of pixels")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out} has no name of a PNG file: let it end in .png")
    for name, folder in (("out", args.out.parent), ("each", args.each)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"--{name}: {folder} is a file, and no folder")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: {args.json.parent} is no folder")
    return args


def image_paths(given: list[Path]) -> list[Path]:
    """The files, and those below the folders. Raises `ValueError` where one is not there."""
    from vqrae_ds.data.shard_writing import find_images

    paths = []
    for path in given:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        paths += find_images(path) if path.is_dir() else [path]
    return paths


if __name__ == "__main__":
    run_tool(main)
