"""Image shards -> code shards: the codes of a whole data set, for the generator that comes next."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vqrae_ds.command_line import OneLineParser, configure_logging, run_tool
from vqrae_ds.worker import this_worker

if TYPE_CHECKING:
    from vqrae_ds.config import DataConfig, ModelConfig
    from vqrae_ds.data.index import ShardIndex
    from vqrae_ds.tokenizing.job import Job

LIMITS = ("max_image_bytes", "max_image_pixels")

EXAMPLES = """\
examples:
  python tools/tokenize_shards.py runs/model data/train codes/train
  deepspeed --num_gpus 8 tools/tokenize_shards.py runs/model 'data/part_{00..31}' codes/all
  torchrun --nproc_per_node 8 tools/tokenize_shards.py runs/model data/train codes/train
  srun python tools/tokenize_shards.py runs/model data/train codes/train --batch-size 128
  python tools/tokenize_shards.py runs/model data/train codes/train --verify

The same command again goes on, with any number of ranks; a rank that was killed loses the shard
that it was at and those that its loader had begun, with small shards several. Shards that are there
are read and held to their checksums first. Ranks do not wait for one another: each begins with its
own share and then helps where shards are left. Another model, data set, size or precision in the
same OUT is refused; batch size, --num-workers and --bad-samples may change.

OUT gets codes-000012.safetensors for the shard 12 of SHARDS: codes uint16 (N, h, w), the keys, each
image's place in its shard, its size and the square that was taken (the largest one in the centre,
resized to the size of the model). vqrae_ds/tokenizing/code_shard.py has the format; numpy maps it,
and CodeDataset of vqrae_ds/tokenizing/dataset.py gives sequences of int64. manifest.json, written
last, has every file with its checksum, what was skipped by kind, and the totals. Samples that were
skipped are in their file with key and kind; those of a shard that was away are tried again by the
next start, and a file is replaced only by one with codes of as many images or more.

Codes are those of model.encode_to_indices on the same batches. With another batch size, or on
another machine, a token that two codes are almost equally near to may get the other one.

Each rank takes the GPU of its number on its machine. Where each sees only its own, as with srun
--gpus-per-task=1, say --device cuda:0.

exit status: 0 done, or left to other ranks; 1 failed, or --verify found damage; 2 a mistake
"""


def main() -> None:
    """Read the command line, tokenize or verify, say what is there."""
    args = make_parser().parse_args()
    check(args)
    from vqrae_ds.config import DataConfig
    from vqrae_ds.config.checking import check as check_section
    from vqrae_ds.config.data_paths import check_indexes

    worker = this_worker(os.environ)
    configure_logging(worker.rank)
    fields = {name: getattr(args, name) for name in ("bad_samples", "num_workers", *LIMITS)}
    given = {name: value for name, value in fields.items() if value is not None}
    data = check_section(DataConfig, {"train": args.shards, **given}, prefix="data.")
    check_indexes(data)

    # From here on torch is needed, which takes seconds to import.
    import torch

    from vqrae_ds.data.opening import Reader, open_index
    from vqrae_ds.device import choose_device
    from vqrae_ds.models.vqrae import read_config
    from vqrae_ds.tokenizing.job import make_job
    from vqrae_ds.tokenizing.model import default_dtype, load_for_encoding
    from vqrae_ds.tokenizing.tokenize import Task, tokenize
    from vqrae_ds.tokenizing.verifying import verify

    config = read_config(args.model)
    index = open_index(args.shards, data, Reader(worker.rank, worker.world_size))
    if args.verify:
        job = job_of_folder(args, config, index, data)
        verdict = verify(args.output, job, index)
        print("\n".join(verdict.damage) if verdict.damage else f"intact: {verdict.totals}")
        sys.exit(1 if verdict.damage else 0)
    device = choose_device(args.device)
    dtype = args.dtype or default_dtype(device)
    job = make_job(args.model, config, index, data, image_size=args.image_size, dtype=dtype)
    batch_size = args.batch_size or (64 if device.type == "cuda" else 16)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    made_with = {"batch_size": batch_size, "device": name, "torch": torch.__version__}
    task = Task(args.output, job, index, data, worker, batch_size, made_with)
    outcome = tokenize(task, lambda: load_for_encoding(args.model, device, dtype))
    rest = f"all is there: {outcome.totals}" if outcome.totals else "the rest is with other ranks"
    print(f"rank {worker.rank}: {outcome.made}; {rest}")


def job_of_folder(
    args: argparse.Namespace, config: ModelConfig, index: ShardIndex, data: DataConfig
) -> Job:
    """The job of MODEL and SHARDS, with what is not given as OUT has it.

    Raises `ValueError` where that of OUT is another one.
    """
    from vqrae_ds.tokenizing.job import check_same, make_job, read_job

    theirs = read_job(args.output)
    size, dtype = args.image_size or theirs.image_size, args.dtype or theirs.dtype
    limits = {name: getattr(args, name) or getattr(theirs, name) for name in LIMITS}
    data = data.model_copy(update=limits)
    job = make_job(args.model, config, index, data, image_size=size, dtype=dtype)
    check_same(args.output, theirs, job)
    return job


def make_parser() -> OneLineParser:
    """The command line."""
    from vqrae_ds.config import DataConfig

    parser = OneLineParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="folder of tools/convert_checkpoint.py")
    add("shards", metavar="SHARDS", help="indexed folders of shards, as data.train names them")
    add("output", metavar="OUT", type=Path, help="folder for the codes, new or of the same job")
    add("--batch-size", type=int, metavar="N", help="default: 64 on a GPU, 16 on a CPU")
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--image-size", type=int, metavar="PX", help="default: the size the model was trained at")
    bad = "a sample that cannot be used ends the run, or is recorded and left out (default: refuse)"
    add("--bad-samples", choices=("refuse", "skip"), default="refuse", help=bad)
    workers = "loader processes a rank, 0 for none (default: %(default)s)"
    add("--num-workers", type=int, metavar="N", default=4, help=workers)
    for name in LIMITS:
        default = DataConfig.model_fields[name].default
        limit = f"more is a bad sample (default: {default}; with --verify that of OUT)"
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=limit)
    add("--device", help="cpu, cuda or cuda:N (default: a GPU a rank where there are any)")
    add("--verify", action="store_true", help="read OUT and compare with MODEL, SHARDS, checksums")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise `ValueError` for what needs no torch to be seen."""
    if not (args.model / "config.json").is_file():
        raise ValueError(f"{args.model} has no config.json: name a folder of convert_checkpoint.py")
    for name in ("batch_size", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: 1 or more")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"{args.output} is no folder: name a new one")


if __name__ == "__main__":
    run_tool(main)
