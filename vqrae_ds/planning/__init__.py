"""What a run needs, from its two files alone: memory, disk, communication, FLOPs and hours.

The networks are built without values, so this needs no weights, no data, no GPU and no deepspeed.
Sizes are bytes; GB is 10^9 of them.
"""

from vqrae_ds.planning.advice import Setting, recommend
from vqrae_ds.planning.fitting import RESERVE, describe_sweep, fits, smallest_fit
from vqrae_ds.planning.offload import Offload, offload_seconds, step_offload
from vqrae_ds.planning.parts import Part, Plan, plan
from vqrae_ds.planning.peak import Peak, host_bytes, peak_bytes
from vqrae_ds.planning.report import describe_plan
from vqrae_ds.planning.run_report import describe_run
from vqrae_ds.planning.states import GB, state_bytes, state_bytes_by_kind
from vqrae_ds.planning.storage import disk_bytes, host_memory
from vqrae_ds.planning.traffic import Bandwidth, Traffic, step_traffic
from vqrae_ds.planning.work import H100_TFLOPS, Speed, work

__all__ = [
    "GB",
    "H100_TFLOPS",
    "RESERVE",
    "Bandwidth",
    "Offload",
    "Part",
    "Peak",
    "Plan",
    "Setting",
    "Speed",
    "Traffic",
    "describe_plan",
    "describe_run",
    "describe_sweep",
    "disk_bytes",
    "fits",
    "host_bytes",
    "host_memory",
    "offload_seconds",
    "peak_bytes",
    "plan",
    "recommend",
    "smallest_fit",
    "state_bytes",
    "state_bytes_by_kind",
    "step_offload",
    "step_traffic",
    "work",
]
