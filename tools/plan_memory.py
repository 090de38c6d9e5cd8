"""Plan a run without a GPU: parameters by part, model states, and the peak of a step on each GPU.

Data and weights that the YAML names need not be there.

example:
  python tools/plan_memory.py --config ds_configs/internvit_6b/stage1.yaml \\
      --deepspeed_config ds_configs/stage1_zero3.json --gpus 8 --gpu-memory 80
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from vqrae_ds.command_line import OneLineParser, run_tool
from vqrae_ds.config import read_run


def main() -> None:
    """Parse the command line, read both files, and print the plan."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="YAML", type=Path, help="as for the trainer")
    add("--deepspeed_config", required=True, metavar="JSON", type=Path, help="as for the trainer")
    add("--gpus", required=True, type=int, metavar="N", help="number of GPUs, one rank on each")
    add("--gpu-memory", required=True, type=float, metavar="GB", help="of one GPU, 10^9 bytes")
    add(
        "overrides",
        nargs="*",
        metavar="a.b=value",
        help="of the YAML; deepspeed.a.b=value of the JSON",
    )
    add(
        "--allow-untested-key",
        action="append",
        default=[],
        metavar="KEY",
        help="as for the trainer",
    )
    args = parser.parse_intermixed_args()
    if args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus} is not a number of GPUs: 1 or more")
    if not 0 < args.gpu_memory < math.inf:
        raise ValueError(f"--gpu-memory {args.gpu_memory:g} is not a size in GB: above 0")
    run = read_run(
        args.config,
        args.deepspeed_config,
        overrides=args.overrides,
        world_size=args.gpus,
        allowed_keys=args.allow_untested_key,
        check_paths=False,
    )
    # Imported here, so that a mistake in the files does not wait for torch.
    from vqrae_ds.planning import describe_plan, plan

    print(describe_plan(plan(run), args.gpus, args.gpu_memory))


if __name__ == "__main__":
    run_tool(main)
