"""What a GPU receives from others in an optimizer step, by kind, with DeepSpeed 0.19.8.

Of N ranks that gather a whole, or reduce one and keep their share, each receives (N - 1) / N of it;
an all-reduce is both. What a GPU sends is as much. Between nodes NCCL's rings take each piece into
a node once, and there it goes from GPU to GPU: so the ranks of a node share what comes from others.
Left out are single numbers (losses, norms of gradients) and codes that SimVQ projects once more.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vqrae_ds.config.deepspeed_json import BatchArithmetic, batch_arithmetic
from vqrae_ds.planning.activations import FP64, value_size
from vqrae_ds.planning.parts import Part, Plan
from vqrae_ds.planning.peak import option
from vqrae_ds.planning.states import data_gpus, zero_stage

GPUS_A_NODE = 8  # where no hpZ says it


class Traffic(NamedTuple):
    """Bytes of one kind that a GPU receives in a step, in a group of `over` GPUs.

    `network` of them come through the GPU's own port from other nodes.
    """

    kind: str
    size: float
    over: int
    network: float


class Group(NamedTuple):
    """The size of a process group, and how many of its ranks are in one node."""

    ranks: int
    here: int


class Bandwidth(NamedTuple):
    """Bytes a second: three that a GPU receives, and what the cores of a node read and write."""

    node: float = 400e9  # NVLink of an H100: 450 GB/s each way by its data sheet
    network: float = 50e9  # a port of 400 Gbit/s for each GPU
    bus: float = 50e9  # between a GPU and its host: PCIe 5.0 x16 has 64 GB/s each way
    host_memory: float = 200e9  # of a node: eight channels of DDR4-3200


def step_traffic(plan: Plan, gpus: int) -> list[Traffic]:
    """What each of `gpus` GPUs receives in an optimizer step; kinds of nothing are left out."""
    batch = batch_arithmetic(plan.run.deepspeed, gpus)
    found = [*_generator(plan, batch), *_tensor_parallel(plan, batch)]
    gan = next((part for part in plan.parts if part.engine == "discriminator"), None)
    if gan is not None:
        sums_and_weights = 3 * gan.count * value_size(plan.run)  # ZeRO-1, over all ranks
        everyone = Group(gpus, min(gpus, node_size(plan)))
        found.append(_moved("discriminator", sums_and_weights, everyone))
    return [one for one in found if one.size > 0]


def node_size(plan: Plan) -> int:
    """GPUs of a node: what hpZ takes for one, else 8."""
    node = option(plan.run.deepspeed, "zero_hpz_partition_size")
    return node if node > 1 else GPUS_A_NODE


def traffic_seconds(traffic: list[Traffic], bandwidth: Bandwidth) -> float:
    """How long all of it takes at these bandwidths, one after the other."""
    return sum(max(t.size / bandwidth.node, t.network / bandwidth.network) for t in traffic)


def _data_group(plan: Plan, batch: BatchArithmetic) -> Group:
    """The ranks that ZeRO divides the generator over; a tensor-parallel group has one of them."""
    ranks = data_gpus(plan, batch.world_size)
    return Group(ranks, min(ranks, max(node_size(plan) // plan.tensor_size, 1)))


def _generator(plan: Plan, batch: BatchArithmetic) -> list[Traffic]:
    """Weights and gradients of the generator.

    ZeRO-3 reduces gradients in each micro step and so does ZeRO-2, whole; ZeRO-1 once a step.
    """
    group = _data_group(plan, batch)
    trained = sum(part.held for part in _parts(plan, "trained")) * value_size(plan.run)
    stage = zero_stage(plan.run.deepspeed)
    if stage < 3:
        sums = trained * (batch.accumulation if stage == 2 else 1)
        return [
            _moved("gradients, summed up", 2 * sums, group),
            _moved("weights after the update", trained, group),
        ]
    gradients = trained * batch.accumulation
    return [*_gathered(plan, batch), _moved("gradients, to their ranks", gradients, group)]


def _gathered(plan: Plan, batch: BatchArithmetic) -> list[Traffic]:
    """Weights that ZeRO-3 gathers: once a micro step, and trained ones for the backward pass too.

    hpZ keeps a copy in the node: of frozen weights for ever, of trained ones from their first use
    after an update. Small weights are whole always, and are gathered after the update alone.
    """
    engine = [part for part in plan.parts if part.engine == "generator" and part.kind != "buffers"]
    whole = sum(part.held for part in engine)
    size = value_size(plan.run) * (1 - plan.persistent / whole)
    frozen = (sum(part.held for part in _parts(plan, "frozen")) + _codes_again(plan)) * size
    first = sum(part.held for part in _parts(plan, "trained")) * size
    again = _gathered_again(plan) * size
    group, node = _data_group(plan, batch), node_size(plan)
    small = plan.persistent * value_size(plan.run)
    after = _moved("small weights, after the update", small, group)
    steps = batch.accumulation
    if option(plan.run.deepspeed, "zero_hpz_partition_size") > 1:
        inside = steps * (frozen + first + again) - first
        return [
            _moved("weights, first use in a step", first, group),
            _moved("weights, inside the node", inside, Group(node, node)),
            after,
        ]
    return [
        _moved("frozen weights", steps * frozen, group),
        _moved("weights, forward", steps * first, group),
        _moved("weights, backward", steps * again, group),
        after,
    ]


def _gathered_again(plan: Plan) -> float:
    """Trained values that ZeRO-3 gathers after the forward pass of a micro step.

    All, but for those that stay where forward turns into backward: half of
    `stage3_max_reuse_distance`, or a third where the blocks there are used a third time, by
    checkpointing. Where that distance is shorter than a block, a block that is computed again is
    gathered for that as well.
    """
    memory, reuse = plan.run.config.memory, option(plan.run.deepspeed, "stage3_max_reuse_distance")
    checkpointed = {}
    if memory.encoder_checkpointing != "none":
        checkpointed["encoder"] = plan.encoder_blocks
    if memory.decoder_checkpointing != "none":
        checkpointed["decoder"] = plan.decoder_blocks
    trained = _parts(plan, "trained")
    twice = sum(part.held * checkpointed.get(part.name, 0.0) for part in trained)
    values = sum(part.held for part in trained)
    stays = min(reuse / (3 if twice else 2), values)
    return values - stays + (twice if reuse < plan.largest_block else 0)


def _codes_again(plan: Plan) -> int:
    """SimVQ's codes and their projection: searched, then looked up.

    The second time they are gathered again unless they stay until then.
    """
    codes = sum(p.held for p in plan.parts if p.name in ("codebook", "code projection"))
    return codes if option(plan.run.deepspeed, "stage3_max_reuse_distance") < codes else 0


def _tensor_parallel(plan: Plan, batch: BatchArithmetic) -> list[Traffic]:
    """All-reduces of the decoder's blocks: two forward, two backward, two where it runs again.

    Beside them the codes that were chosen, and each rank's candidates for them with distances.
    """
    size, model = batch.tensor_size, plan.run.config.model
    if size == 1:
        return []
    again = plan.run.config.memory.decoder_checkpointing != "none"
    tokens = batch.micro_batch * batch.accumulation * model.grid_side**2
    sums = model.decoder.num_layers * (6 if again else 4) * tokens * model.decoder.hidden_size
    sums += tokens * model.embedding_dim
    group = Group(size, min(size, node_size(plan)))
    candidates = size * tokens * 2 * FP64
    return [
        _moved("tensor parallelism, sums", 2 * sums * value_size(plan.run), group),
        _moved("tensor parallelism, nearest codes", candidates, group),
    ]


def _moved(kind: str, whole: float, group: Group) -> Traffic:
    ranks, here = group
    network = whole * (ranks - here) / ranks / here
    return Traffic(kind, whole * (ranks - 1) / ranks, ranks, network)


def _parts(plan: Plan, kind: Literal["trained", "frozen"]) -> list[Part]:
    return [part for part in plan.parts if part.engine == "generator" and part.kind == kind]
