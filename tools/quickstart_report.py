"""What the quickstart ends with: summary.json and reconstructions.png."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vqrae_ds import VQRAE
from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.data.decode import load_image
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.evaluation.report import image_grid, save_grid
from vqrae_ds.evaluation.summary import summarize_run
from vqrae_ds.manifest import write_json_atomically

EXAMPLE = """\
example:
  python tools/quickstart_report.py runs/quickstart tests/data/photos/val
"""


def main() -> None:
    """Read the command line and write both files."""
    parser = OneLineParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the quickstart's output folder")
    parser.add_argument("photographs", type=Path, help="folder of photographs to reconstruct")
    args = parser.parse_args()
    stage1, stage2 = (summarize_run(args.folder / name) for name in ("stage1", "stage2"))
    picture = args.folder / "reconstructions.png"
    models = [VQRAE.from_pretrained(args.folder / f) for f in ("stage1_weights", "inference")]
    size = models[0].config.image_size
    photographs = find_images(args.photographs)
    images_B3HW = torch.stack([load_image(path, image_size=size) for path in photographs])
    columns = [images_B3HW]
    with torch.no_grad():
        columns += [m.decode_from_indices(m.encode_to_indices(images_B3HW)) for m in models]
    save_grid(image_grid(columns, min_side=256), picture)
    summary = {
        "stage1": stage1.figures,
        "stage2": stage2.figures,
        "baseline_psnr": stage2.baseline_psnr,
        "inference_dir": str(args.folder / "inference"),
        "reconstructions": str(picture),
    }
    write_json_atomically(args.folder / "summary.json", summary)
    for name, summarized in (("stage 1", stage1), ("stage 2", stage2)):
        shown = "  ".join(f"{key} {value:.4g}" for key, value in summarized.figures.items())
        print(f"{name}: {shown}")
    print(f"mean colour of each photograph: PSNR {stage2.baseline_psnr:.4g} dB")


if __name__ == "__main__":
    run_tool(main)
