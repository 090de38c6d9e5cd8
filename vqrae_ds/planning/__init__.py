"""What a run needs, from its two files alone: parameters, model states, the peak of a step.

The networks are built without values, so this needs no weights, no data, no GPU and no deepspeed.
Sizes are bytes; GB is 10^9 of them.
"""

from vqrae_ds.planning.parts import Part, Plan, plan
from vqrae_ds.planning.peak import Peak, host_bytes, peak_bytes
from vqrae_ds.planning.report import describe_plan
from vqrae_ds.planning.states import GB, state_bytes

__all__ = [
    "GB",
    "Part",
    "Peak",
    "Plan",
    "describe_plan",
    "host_bytes",
    "peak_bytes",
    "plan",
    "state_bytes",
]
