"""Put a folder of images into tar shards with an index, or index shards that already exist."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.data.decode import broken_images
from vqrae_ds.data.index import find_images, index_shards, write_shards

USAGE = """\
make_shards.py IMAGES OUT [--samples-per-shard N]
       make_shards.py --index-only OUT"""
EXAMPLES = """\
examples:
  python tools/make_shards.py photos/train data/train --samples-per-shard 5000
  python tools/make_shards.py --index-only data/laion_part_00
"""


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        usage=USAGE,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        type=Path,
        nargs="?",
        help="folder of jpg, jpeg, png and webp files, searched with its subfolders",
    )
    parser.add_argument(
        "output",
        metavar="OUT",
        type=Path,
        help="folder for the shards, new or empty; with --index-only, the folder where they lie",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--samples-per-shard",
        metavar="N",
        type=int,
        default=10_000,
        help="images a tar file holds at most (default: %(default)s)",
    )
    action.add_argument(
        "--index-only", action="store_true", help="write only index.json, for the shards in OUT"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.index_only:
        if arguments.images is not None:
            raise ValueError(f"--index-only takes OUT alone, not {arguments.images} as well")
        index = index_shards(arguments.output)
    else:
        if arguments.images is None:
            raise ValueError(f"only one folder ({arguments.output}) is named: give IMAGES and OUT")
        images = find_images(arguments.images)
        if broken := broken_images(images):
            more = f" | and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise ValueError(
                f"take out what no training could read: {' | '.join(broken[:3])}{more}"
            )
        index = write_shards(
            images,
            arguments.output,
            samples_per_shard=arguments.samples_per_shard,
            root=arguments.images,
        )
    print(f"{arguments.output}: {index.num_samples} images in {len(index.shards)} shards")


if __name__ == "__main__":
    run_tool(main)
