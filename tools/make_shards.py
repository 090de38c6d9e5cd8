"""Put a folder of images into tar shards with an index, or index shards that already exist."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.data.decode import broken_images
from vqrae_ds.data.indexing import Part, index_shards, left_out
from vqrae_ds.data.shard_writing import find_images, write_shards

USAGE = """\
make_shards.py IMAGES OUT [--samples-per-shard N]
       make_shards.py --index-only OUT [--processes N] [--skip-bad] [--part K/N]"""
EXAMPLES = """\
examples:
  python tools/make_shards.py photos/train data/train --samples-per-shard 5000
  python tools/make_shards.py --index-only data/datacomp_00 --processes 32 --skip-bad
  python tools/make_shards.py --index-only data/datacomp_01 --part 3/8   # the third of 8 machines
  python tools/make_shards.py --index-only data/datacomp_01              # then once: merges

A build that was interrupted goes on where it was. Several folders are one data set to a training
that names them all: data.train=data/datacomp_{00..31}, or data/{some,others}.

What it takes: every byte is read once, for the checksums. Measured on 1,000 shards of 1,000 samples
with their json and txt (3 million members, 4.8 GB): 18 s of one core, 36 MB of memory a process,
4.3 bytes a sample. By these, 1.3 billion such samples take 6.5 hours of one core, 12 minutes of 32,
and as long as the disk needs for their bytes; with lengths as images of 40 kB have them the index
has 4.9 bytes a sample, 6.4 GB, where keys are numbers, and 22 (28 GB) where they are random. A
training holds the list of shards alone: 105 MB a rank for 130,000 of them, read in 4 s.
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
        "--index-only", action="store_true", help="write only the index, for the shards in OUT"
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="shards read at the same time, with --index-only (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="with --index-only: leave out what is no image, twice there, cut or damaged, count it",
    )
    parser.add_argument(
        "--part",
        metavar="K/N",
        type=_part,
        help="with --index-only: read only the K-th of N parts of the shards, for a later build",
    )
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.index_only:
        if arguments.images is not None:
            raise ValueError(f"--index-only takes OUT alone, not {arguments.images} as well")
        index = index_shards(
            arguments.output,
            processes=arguments.processes,
            skip_bad=arguments.skip_bad,
            part=arguments.part,
            show_progress=True,
        )
        if index is None:
            print(f"{arguments.output}: the part is read; --index-only without --part merges")
            return
    else:
        if arguments.skip_bad or arguments.part or arguments.processes != 1:
            raise ValueError("--processes, --skip-bad and --part are for --index-only")
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
    for kind, number in sorted(left_out(index.shards).items()):
        print(f"left out: {number} x {kind}")


def _part(text: str) -> Part:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"{text} is not K/N, the K-th of N parts: 3/8, for example"
        )
    return Part(int(number), int(count))


if __name__ == "__main__":
    run_tool(main)
