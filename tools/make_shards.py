"""Put a folder of images into tar shards with an index, or index or verify shards that exist."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.data.decode import broken_images
from vqrae_ds.data.faults import BadSample
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.indexing import Part, index_shards, left_out
from vqrae_ds.data.sample_table import IMAGE_EXTENSIONS
from vqrae_ds.data.shard_writing import find_images, passed_over, write_shards
from vqrae_ds.data.verifying import verify_shards

USAGE = """\
make_shards.py IMAGES OUT [--samples-per-shard N] [--skip-bad]
       make_shards.py --index-only OUT [--processes N] [--skip-bad] [--part K/N]
       make_shards.py --verify OUT [--processes N]"""
EXAMPLES = """\
examples:
  python tools/make_shards.py photos/train data/train --samples-per-shard 5000
  python tools/make_shards.py photos/web data/web --skip-bad
  python tools/make_shards.py --index-only data/datacomp_00 --processes 32 --skip-bad
  python tools/make_shards.py --index-only data/datacomp_01 --part 3/8   # the third of 8 machines
  python tools/make_shards.py --index-only data/datacomp_01              # then once: merges
  python tools/make_shards.py --verify data/datacomp_00 --processes 32   # after a copy, a doubt

A build that was interrupted goes on where it was. Several folders are one data set to a training
that names them all: data.train=data/datacomp_{00..31}, or data/{some,others}.

Every byte is read once, for the checksums. tools/README.md has what an index of 1.3 billion images
takes. A training compares no checksum, only sizes and times: --verify reads all that is there.

exit status: 0 done, 1 a shard is not what was indexed, or the machine failed, 2 a mistake
"""
_NAMED_TYPES = 8


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
    action.add_argument(
        "--verify", action="store_true", help="compare the shards in OUT with their index"
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="shards read at the same time, with --index-only or --verify (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out pictures that cannot be decoded; with --index-only what is no image, twice "
        "there, cut or damaged; count them by kind",
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
    if (arguments.index_only or arguments.verify) and arguments.images is not None:
        option = "--index-only" if arguments.index_only else "--verify"
        raise ValueError(f"{option} takes OUT alone, not {arguments.images} as well")
    if arguments.part and not arguments.index_only:
        raise ValueError("--part is for --index-only")
    if arguments.skip_bad and arguments.verify:
        raise ValueError("--skip-bad is not for --verify, which leaves nothing out")
    if arguments.verify:
        verify(arguments.output, arguments.processes)
        return
    if arguments.index_only:
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
        print(f"{arguments.output}: {_extent(index)}")
        for kind, number in sorted(left_out(index.shards).items()):
            print(f"left out: {number} x {kind}")
        return
    if arguments.processes != 1:
        raise ValueError("--processes is for --index-only and --verify")
    if arguments.images is None:
        raise ValueError(f"only one folder ({arguments.output}) is named: give IMAGES and OUT")
    make(arguments.images, arguments.output, arguments.samples_per_shard, arguments.skip_bad)


def make(folder: Path, output: Path, samples_per_shard: int, skip_bad: bool) -> None:
    """Write the shards, and say what they have and what they have not.

    Raises `ValueError` where a picture cannot be decoded, unless `skip_bad`.
    """
    images, others = find_images(folder), passed_over(folder)
    broken = broken_images(images)
    faults = list(broken.values())
    if faults and not skip_bad:
        more = f" | and {len(faults) - 3} more" if len(faults) > 3 else ""
        named = " | ".join(map(str, faults[:3]))
        raise ValueError(
            f"take out what no training could read, or leave it out by --skip-bad: {named}{more}"
        )
    sound = [path for path in images if path not in broken]
    index = write_shards(sound, output, samples_per_shard=samples_per_shard, root=folder)
    print(f"{output}: {_extent(index)}{_other_types(others)}")
    for line in _by_kind(faults):
        print(f"left out: {line}")


def _extent(index: ShardIndex) -> str:
    num_images, num_shards = index.num_samples, len(index.shards)
    images = "image" if num_images == 1 else "images"
    return f"{num_images} {images} in {num_shards} {'shard' if num_shards == 1 else 'shards'}"


def _other_types(found: Counter[str]) -> str:
    """What to say of files that are not taken for images; of many types, those of most files."""
    if not found:
        return ""
    ordered = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    named = [f"{number} {extension}" for extension, number in ordered[:_NAMED_TYPES]]
    if rest := sum(number for _, number in ordered[_NAMED_TYPES:]):
        named.append(f"{rest} of other types")
    return f"; passed over: {', '.join(named)} (taken are {', '.join(IMAGE_EXTENSIONS)})"


def _by_kind(faults: Sequence[BadSample]) -> list[str]:
    """A line for each kind of fault: how many there are, and the first."""
    first: dict[str, BadSample] = {}
    for fault in faults:
        first.setdefault(fault.kind, fault)
    number = Counter(fault.kind for fault in faults)
    return [f"{number[kind]} x {kind}, the first {first[kind]}" for kind in sorted(first)]


def verify(folder: Path, processes: int) -> None:
    """Say which shards are not what was indexed; then the exit status is 1."""
    faults = verify_shards(folder, processes=processes, show_progress=True)
    for fault in faults:
        print(fault)
    if faults:
        sys.exit(1)
    print(f"{folder}: every shard is what was indexed")


def _part(text: str) -> Part:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"{text} is not K/N, the K-th of N parts: 3/8, for example"
        )
    return Part(int(number), int(count))


if __name__ == "__main__":
    run_tool(main)
