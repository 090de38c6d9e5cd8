"""Plan a run without a GPU: memory, disk, communication, FLOPs and hours, from its two files.

Shown are parameters by part, model states and the peak of a step on each GPU; then which GPUs are
enough, the memory of the hosts, the disk for checkpoints, what a GPU receives in a step, how long
the schedule takes, and a setting to take. Data and weights that the YAML names need not be there.

examples:
  python tools/plan_memory.py --config ds_configs/internvit_6b/stage1.yaml \\
      --deepspeed_config ds_configs/stage1_zero3.json --gpus 8 --gpu-memory 80
  python tools/plan_memory.py --config ds_configs/internvit_6b/stage1.yaml \\
      --deepspeed_config ds_configs/stage1_zero3.json --sweep 8,64,512
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.config import Run, read_run


def main() -> None:
    """Parse the command line, read both files, and print the plan."""
    args = _parser().parse_intermixed_args()
    numbers = [args.gpus] if args.sweep is None else _numbers(args.sweep)
    if min(numbers) < 1:
        name = "--gpus" if args.sweep is None else "--sweep"
        raise ValueError(f"{name} {min(numbers)} is not a number of GPUs: 1 or more")
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu {args.mfu:g} is no share of the peak: above 0, at most 1")
    sizes = {
        "--gpu-memory": (args.gpu_memory, "size in GB"),
        "--peak-tflops": (1.0 if args.peak_tflops is None else args.peak_tflops, "peak in TFLOP/s"),
        "--node-bandwidth": (args.node_bandwidth, "bandwidth in GB/s"),
        "--network-bandwidth": (args.network_bandwidth, "bandwidth in GB/s"),
        "--bus-bandwidth": (args.bus_bandwidth, "bandwidth in GB/s"),
        "--host-bandwidth": (args.host_bandwidth, "bandwidth in GB/s"),
    }
    for name, (value, what) in sizes.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} {value:g} is not a {what}: above 0")
    runs = [_read(args, gpus) for gpus in numbers]
    print(_described(runs, args))


def _described(runs: list[Run], args: argparse.Namespace) -> str:
    """The plan of a run, or the table of a sweep."""
    # Imported here, so that a mistake in the files does not wait for torch.
    from vqrae_ds import planning

    peak = args.peak_tflops or runs[0].config.monitor.peak_tflops
    if peak is None and runs[0].bf16:
        peak = planning.H100_TFLOPS
    links = (args.node_bandwidth, args.network_bandwidth, args.bus_bandwidth, args.host_bandwidth)
    bandwidth = planning.Bandwidth(*(link * 1e9 for link in links))
    speed = None if peak is None else planning.Speed(peak, args.mfu, bandwidth)
    planned = planning.plan(runs[0])
    if args.sweep is not None:
        plans = [planned._replace(run=run) for run in runs]
        return planning.describe_sweep(plans, speed, args.gpu_memory)
    memory = planning.describe_plan(planned, args.gpus, args.gpu_memory)
    return f"{memory}\n\n{planning.describe_run(planned, args.gpus, args.gpu_memory, speed)}"


def _read(args: argparse.Namespace, gpus: int) -> Run:
    return read_run(
        args.config,
        args.deepspeed_config,
        overrides=args.overrides,
        world_size=gpus,
        allowed_keys=args.allow_untested_key,
        check_paths=False,
    )


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--sweep {text} is no list of numbers of GPUs: 8,64,512 for example")
    return [int(word) for word in words]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="YAML", type=Path, help="as for the trainer")
    add("--deepspeed_config", required=True, metavar="JSON", type=Path, help="as for the trainer")
    how_many = parser.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--gpus", type=int, metavar="N", help="number of GPUs, one rank on each")
    sweep = "numbers of GPUs: a table with a row for each, in place of the plan"
    how_many.add_argument("--sweep", metavar="N,N,..", help=sweep)
    memory = "of one GPU, 10^9 bytes, beside 40, 80 and 141; default 80"
    add("--gpu-memory", default=80.0, type=float, metavar="GB", help=memory)
    share = "model FLOPs of a step over what the GPUs could do in its time, up to 1; default 0.4"
    add("--mfu", default=0.4, type=float, metavar="SHARE", help=share)
    peak = "of one GPU; default monitor.peak_tflops, else 989 in bf16 (H100)"
    add("--peak-tflops", type=float, metavar="TFLOP/S", help=peak)
    node = "that a GPU receives in all; default 400 (NVLink)"
    add("--node-bandwidth", default=400.0, type=float, metavar="GB/S", help=node)
    network = "of the port to other nodes that a GPU has; default 50"
    add("--network-bandwidth", default=50.0, type=float, metavar="GB/S", help=network)
    bus = "between a GPU and its host, for an offloaded optimizer; default 50 (PCIe 5.0 x16)"
    add("--bus-bandwidth", default=50.0, type=float, metavar="GB/S", help=bus)
    host = "of a node's memory, for the update of an offloaded optimizer; default 200"
    add("--host-bandwidth", default=200.0, type=float, metavar="GB/S", help=host)
    overrides = "of the YAML; deepspeed.a.b=value of the JSON"
    add("overrides", nargs="*", metavar="a.b=value", help=overrides)
    add(
        "--allow-untested-key",
        action="append",
        default=[],
        metavar="KEY",
        help="as for the trainer",
    )
    return parser


if __name__ == "__main__":
    run_tool(main)
