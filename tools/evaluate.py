"""How good a tokenizer is on a set of images: reconstruction, codes, and what is left of features.

Over one process or many ranks, with the same numbers. Writes report.json, report.md and page.png.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vqrae_ds.command_line import (
    USER_ERRORS,
    OneLineParser,
    configure_logging,
    end_process_after,
    exit_with,
    run_tool,
)
from vqrae_ds.worker import this_worker

if TYPE_CHECKING:
    from vqrae_ds.config import DataConfig
    from vqrae_ds.data.index import ShardIndex
    from vqrae_ds.data.opening import Reader
    from vqrae_ds.evaluation.instruments import Opened
    from vqrae_ds.evaluation.whole_set import SetFigures

PAGE = "page.png"

EXAMPLE = """\
examples:
  python tools/evaluate.py runs/quickstart/inference runs/quickstart/data/val
  torchrun --nproc_per_node 8 tools/evaluate.py MODEL 'data/imagenet_val_{0..3}' --out MODEL/eval \\
      --inception pt_inception-2015-12-05-6726825d.pth --encoder weights/InternViT-6B-448px-V2_5
  deepspeed --num_gpus 8 tools/evaluate.py MODEL SHARDS --size 448 --batch-size 32

What is measured, each figure with the tokens an image and the compression beside it:
  PSNR, SSIM        always
  LPIPS             with the weights of tools/make_lpips_weights.py, or torchvision's
  rFID              with --inception, the published weights of 2015; with others the distance has
                    another name
  codes             usage, perplexity and how often each is used, over the whole set
  retention         with --encoder: cosine and squared distance of the features to the original
                    encoder's, and how many of ten nearest images are the same
  classes           where images have a KEY.cls, or a field --label-field in KEY.json: accuracy of
                    the neighbours and of a linear probe, on the features of either encoder;
                    left out, with the reason, where they cannot be read

The protocol is fixed: the largest centre square, resized by an antialiased bicubic filter in 8 bit;
reconstructions are rounded to 8 bit; neither is resized again, but by Inception, to 299 px. Figures
of other sizes and token counts are not comparable. report.json has all of it.
"""


def main() -> None:
    """Read the command line, measure the set, and have the first rank write the report."""
    args = parse_arguments()
    configure_logging(this_worker(os.environ).rank)
    # Imported here, so that --help and mistakes do not wait for torch.
    from vqrae_ds.evaluation.joining import joined_ranks

    with joined_ranks() as reader:
        try:
            measured = measure(args, reader)
        except USER_ERRORS as error:  # the same on every rank: one of them says it
            exit_with(error, silent=reader.rank != 0)
    if measured is not None:
        report(args, measured)


def parse_arguments() -> argparse.Namespace:
    """Raises `ValueError` for a mistake that can be seen without opening the data."""
    parser = OneLineParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of tools/convert_checkpoint.py")
    add("shards", metavar="SHARDS", help="folder of tools/make_shards.py; braces name several")
    add("--out", type=Path, metavar="DIR", help="for the report (default: MODEL/evaluation)")
    add("--size", type=int, metavar="PX", help="side of the images (default: as trained)")
    add("--images", type=int, metavar="N", help="only the first N of the index")
    add("--batch-size", type=int, default=16, metavar="N", help="a rank's (default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16"), help="of the weights (default: as they are stored)")
    add("--encoder", type=Path, metavar="DIR", help="the original encoder: a folder of "
        "tools/import_encoder.py, or the model of stage 1")  # fmt: skip
    add("--lpips", type=Path, metavar="FILE", help="weights of tools/make_lpips_weights.py")
    add("--inception", type=Path, metavar="FILE", help="weights for rFID")
    add("--label-field", default="label", metavar="NAME", help="of KEY.json (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be used, count them")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU a rank where there are any)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # of the launcher
    args = parser.parse_args()
    args.out = args.out or args.model / "evaluation"
    for name in ("size", "images", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not a number of 1 or more")
    if not (args.model / "config.json").is_file():
        raise ValueError(f"{args.model} has no config.json: give a folder of convert_checkpoint.py")
    if args.encoder is not None and not (args.encoder / "config.json").is_file():
        raise ValueError(f"--encoder {args.encoder} has no config.json: it is no folder of weights")
    for name in ("lpips", "inception"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name} {path} is missing: give that file, or leave the option out")
    return args


class Measured(NamedTuple):
    """What the first rank makes the report of."""

    index: ShardIndex
    data: DataConfig
    opened: Opened
    image_size: int
    found: SetFigures


def measure(args: argparse.Namespace, reader: Reader) -> Measured | None:
    """Every rank calls it; the first gets what was found."""
    from vqrae_ds.config import DataConfig
    from vqrae_ds.data.opening import open_index
    from vqrae_ds.device import choose_device
    from vqrae_ds.evaluation.instruments import Wanted, open_instruments
    from vqrae_ds.evaluation.whole_set import measure_set
    from vqrae_ds.ranks import failing_together

    data = DataConfig(train=args.shards, bad_samples="skip" if args.skip_bad else "refuse")
    with failing_together():
        index = open_index(args.shards, data, reader)
        opened = open_instruments(
            Wanted(args.model, args.encoder, args.lpips, args.inception),
            dtype=args.dtype,
            image_size=args.size,
            device=choose_device(args.device),
        )
        # Now, and not after hours of measuring.
        args.out.mkdir(parents=True, exist_ok=True)
    image_size = args.size or opened.instruments.model.config.image_size
    found = measure_set(
        opened.instruments,
        index,
        data,
        reader,
        image_size=image_size,
        batch_size=args.batch_size,
        num_images=args.images,
    )
    return None if found is None else Measured(index, data, opened, image_size, found)


def report(args: argparse.Namespace, measured: Measured) -> None:
    """Write the three files, and the figures to stdout."""
    from vqrae_ds.data.opening import decoding_of
    from vqrae_ds.evaluation.labels import read_labels
    from vqrae_ds.evaluation.picture_page import draw_page
    from vqrae_ds.evaluation.set_report import as_lines, as_markdown
    from vqrae_ds.evaluation.set_summary import Subject, summarize_set
    from vqrae_ds.manifest import write_json_atomically

    index, data, (instruments, left_out), image_size, found = measured
    model = instruments.model
    dtype = model.decoder.head.weight.dtype
    labels = None
    try:  # no peer waits any more: the shards are read once again for it
        labels = read_labels(
            index, args.label_field, num_images=args.images, skip_bad=args.skip_bad
        )
    except ValueError as error:  # which must not cost what was measured
        left_out = {**left_out, "classes": str(error)}
    numbers = summarize_set(
        Subject(args.model, model.config, dtype, args.shards, image_size),
        found,
        labels,
        is_canonical=instruments.inception is not None and instruments.inception.is_canonical,
        left_out=left_out,
    )
    (args.out / "report.md").write_text(as_markdown(numbers))
    write_json_atomically(args.out / "report.json", numbers)
    print("\n".join(as_lines(numbers)))
    decoding = decoding_of(data)
    draw_page(model, index, found, args.out / PAGE, image_size=image_size, decoding=decoding)
    print(f"{args.out}: report.json, report.md and {PAGE}")


if __name__ == "__main__":
    end_process_after(lambda: run_tool(main))
