"""What a run needs beside its GPUs: disk for its checkpoints, and memory of the hosts."""

from __future__ import annotations

from typing import NamedTuple

from vqrae_ds.config.deepspeed_json import get
from vqrae_ds.launching.checkpoint_size import Counts, checkpoint_bytes
from vqrae_ds.planning.activations import value_size
from vqrae_ds.planning.parts import Plan
from vqrae_ds.planning.peak import host_bytes, option
from vqrae_ds.planning.states import FP32, data_gpus, is_offloaded, zero_stage
from vqrae_ds.planning.traffic import node_size

JUDGES = ("LPIPS", "ConvNeXt-S")  # in no checkpoint: each run reads them from their own files


class Disk(NamedTuple):
    """Bytes of a run's checkpoints.

    `number` of them are there at most at once, the one that is being written included; the frozen
    `pretrained` weights are there once.
    """

    checkpoint: float
    number: int
    pretrained: float

    @property
    def total(self) -> float:
        """The most that the run's folder takes."""
        return self.number * self.checkpoint + self.pretrained


class HostMemory(NamedTuple):
    """Bytes that each rank takes of its node's memory, beside Python and its libraries."""

    optimizer: float  # with `offload_optimizer`
    images: float  # decoded ahead by the loader's processes
    saving: float  # the largest tensor of a checkpoint: each is copied to the host to be written
    ranks: int  # of a node

    @property
    def node(self) -> float:
        """Of all ranks of a node."""
        return self.ranks * (self.optimizer + self.images + self.saving)


def disk_bytes(plan: Plan) -> Disk:
    """What the checkpoints of the whole run take; one is known to within a few percent."""
    own = value_size(plan.run)
    pretrained = [p for p in plan.parts if p.kind == "frozen" and p.name in ("encoder", "teacher")]
    generator = [part for part in plan.parts if part.engine == "generator"]
    counts = Counts(
        trained=plan.tensor_size * sum(p.held for p in generator if p.kind == "trained"),
        frozen=sum(p.count for p in generator if p.kind == "frozen" and p not in pretrained),
        pretrained=sum(part.count for part in pretrained),
        buffers=sum(part.count for part in plan.parts if part.kind == "buffers"),
        discriminator=sum(p.count for p in plan.parts if p.engine == "discriminator"),
    )
    number = plan.run.config.checkpoint.most_at_once(plan.run.schedule.total_steps)
    return Disk(checkpoint_bytes(plan.run, counts), number, counts.pretrained * own)


def host_memory(plan: Plan, gpus: int) -> HostMemory:
    """Of each rank, one on each of `gpus` GPUs."""
    config, model = plan.run.config, plan.run.config.model
    batches = config.data.num_workers * config.data.prefetch_batches
    image = 3 * model.image_size**2 * FP32
    images = batches * plan.run.schedule.batch.micro_batch * image
    trained = [p.held for p in plan.parts if p.engine == "generator" and p.kind == "trained"]
    largest = sum(trained) / data_gpus(plan, gpus)
    if zero_stage(plan.run.deepspeed) == 3:
        largest = min(largest, option(plan.run.deepspeed, "sub_group_size"))
    low = get(plan.run.deepspeed, "bf16.bf16_master_weights_and_grads")
    saving = 0.0 if is_offloaded(plan.run.deepspeed) else largest * (2 if low else FP32)
    ranks = min(gpus, node_size(plan))
    return HostMemory(host_bytes(plan) / gpus, images, saving, ranks)
