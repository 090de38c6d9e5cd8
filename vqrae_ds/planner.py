"""What a run needs, from its two files alone: parameters by part, model states on each GPU.

The networks are built without values, so this needs no weights, no data, no GPU and no deepspeed.
Not here yet: activations, buffers of the communication, time and cost.

The bytes are those that DeepSpeed 0.19.8 keeps between two micro batches: ZeRO-3 divides everything
over the GPUs, ZeRO-2 all but the parameters, ZeRO-1 all but parameters and gradients. It keeps
masters beside parameters of the same dtype too. hpZ keeps a second partition of the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from vqrae_ds.config import ModelConfig, Run
from vqrae_ds.config.deepspeed_json import batch_arithmetic, get
from vqrae_ds.models.discriminator import build_discriminator
from vqrae_ds.models.vqrae import VQRAE

GB = 10**9
FP32, BF16 = 4, 2
VGG16_CONVOLUTIONS, LPIPS_HEADS = 14_714_688, 64 + 128 + 256 + 512 + 512
NOT_PLANNED = (
    "not in this plan yet: activations, gathered parameters and buckets of ZeRO, the workspaces of "
    "kernels, fragmentation"
)

DIVIDED = {  # by ZeRO stage
    1: "masters and optimizer states",
    2: "gradients, masters and optimizer states",
    3: "all of them and the frozen parameters",
}

Engine = Literal["generator", "discriminator", "resident", "none"]


class Part(NamedTuple):
    """A row of the plan. What no engine holds is frozen and whole on every GPU.

    `resident` is the encoder in the generator's dtype, `none` is fp32.
    """

    name: str
    count: int  # of parameters, or of values where they are buffers
    kind: Literal["trained", "frozen", "buffers"]
    engine: Engine
    what: str


class ParameterBytes(NamedTuple):
    """Bytes that a trained parameter takes; a frozen one takes `parameter` alone."""

    parameter: int
    gradient: int
    master: int
    optimizer: int


class Plan(NamedTuple):
    """All parts of a run, and what its DeepSpeed JSON does with them."""

    run: Run
    parts: tuple[Part, ...]
    note: str  # on the size of the encoder, where other sources count it otherwise

    def count(self, kind: str) -> int:
        """The number of parameters that are `trained` or `frozen`."""
        return sum(part.count for part in self.parts if part.kind == kind)


def plan(run: Run) -> Plan:
    """The plan of a run; `read_run(..., check_paths=False)` reads one without data and weights."""
    config, losses = run.config, run.config.losses
    with torch.device("meta"):
        vqrae = VQRAE(config=config.model, freeze_encoder=config.stage == 1)
    parts = _parts_of_vqrae(vqrae, config.model)
    distillation, gan = losses.distillation, losses.adversarial
    if distillation is not None and distillation.teacher.weight > 0:
        teacher = Part("teacher", parts[0].count, "frozen", "generator", "the encoder as it began")
        parts.insert(1, teacher)
    if config.memory.frozen_encoder == "resident":
        frozen = [part for part in parts[:2] if part.name in ("encoder", "teacher")][-1]
        if frozen.kind == "frozen":
            parts[parts.index(frozen)] = frozen._replace(engine="resident")
    if gan is not None and gan.weight > 0:
        with torch.device("meta"):
            discriminator = build_discriminator(gan)
        what = f"{gan.num_layers} layers from {gan.channels} channels, under ZeRO-1"
        count = _count(dict(discriminator.named_parameters()))
        parts.append(Part("discriminator", count, "trained", "discriminator", what))
    if losses.perceptual is not None:
        what = f"VGG16 {VGG16_CONVOLUTIONS:,} + heads {LPIPS_HEADS:,}, in fp32"
        parts.append(Part("LPIPS", VGG16_CONVOLUTIONS + LPIPS_HEADS, "frozen", "none", what))
    return Plan(run, tuple(parts), _note_on_the_encoder(vqrae, config.model))


def state_bytes(plan: Plan, gpus: int) -> list[float]:
    """Bytes of model states on each of `gpus` GPUs, a number for each part of the plan."""
    return [_bytes(part, plan.run.deepspeed, gpus) for part in plan.parts]


def describe_plan(plan: Plan, gpus: int, gpu_memory: float) -> str:
    """The table of the parts, and whether their states fit into `gpu_memory` GB.

    Raises `ValueError`, as the trainer does, where the batch cannot be divided by `gpus`.
    """
    batch = batch_arithmetic(plan.run.deepspeed, gpus)
    sizes = state_bytes(plan, gpus)
    total, model = sum(sizes) / GB, plan.run.config.model
    generator = sum(
        size for part, size in zip(plan.parts, sizes, strict=True) if part.engine == "generator"
    )
    stage = _zero_stage(plan.run.deepspeed)
    lines = [
        f"image:  {model.image_size} px, {model.grid_side} x {model.grid_side} = "
        f"{model.grid_side**2:,} tokens",
        f"batch:  {batch.in_words()}",
        "",
        *_table(_rows(plan, sizes)),
        *([plan.note] if plan.note else []),
        "",
        f"bytes a trained parameter: {_describe_bytes(plan.run.deepspeed)}",
        f"ZeRO-{stage} divides {DIVIDED[stage]} by {gpus}",
        f"model states {total:.1f} GB of {gpu_memory:g} GB a GPU, of which the generator "
        f"{generator / GB:.1f} (GB = 10^9 bytes); activations and buffers come on top",
    ]
    if total > gpu_memory:
        lines.append(_way_out(plan, gpu_memory))
    return "\n".join([*lines, NOT_PLANNED])


def _rows(plan: Plan, sizes: list[float]) -> list[tuple[str, ...]]:
    """The cells of the table, its head and its total included."""
    rows = [("part", "count", "million", "", "GB a GPU", "what it is")]
    for part, size in zip(plan.parts, sizes, strict=True):
        numbers = (f"{part.count:,}", f"{part.count / 1e6:,.2f}", part.kind, f"{size / GB:.2f}")
        rows.append((part.name, *numbers, part.what))
    trained, frozen = plan.count("trained"), plan.count("frozen")
    count, what = trained + frozen, f"{trained:,} trained + {frozen:,} frozen"
    numbers = (f"{count:,}", f"{count / 1e6:,.2f}", "", f"{sum(sizes) / GB:.2f}")
    return [*rows, ("total", *numbers, what)]


def _parts_of_vqrae(vqrae: VQRAE, config: ModelConfig) -> list[Part]:
    shape, decoder = config.encoder_shape, config.decoder
    cut = shape.num_hidden_layers - config.feature_layer
    rest = f" ({cut} more in the checkpoint are not built)" if cut else ""
    px, dim, codes = config.output_patch_size, config.embedding_dim, config.num_embeddings
    bias = "with" if config.codebook_projection_bias else "without"
    rows = (  # name, prefixes of its parameters, what it is
        (
            "encoder",
            ("encoder.",),
            f"{config.encoder_cls}: {config.feature_layer} blocks x {shape.hidden_size}, "
            f"{shape.num_attention_heads} heads{rest}",
        ),
        (
            "projections",
            ("in_proj.", "out_proj."),
            f"{shape.hidden_size} -> {dim} -> {decoder.hidden_size}",
        ),
        ("codebook", ("quantizer.embedding.",), f"SimVQ: {codes:,} codes of {dim}"),
        ("code projection", ("quantizer.embedding_proj.",), f"{dim} -> {dim} {bias} bias"),
        (
            "decoder",
            ("decoder.",),
            f"{decoder.num_layers} blocks x {decoder.hidden_size}, {decoder.num_heads} heads, "
            f"{px} x {px} px a token",
        ),
    )
    parts, parameters = [], dict(vqrae.named_parameters())
    for name, prefixes, what in rows:
        own = {n: p for n, p in parameters.items() if n.startswith(prefixes)}
        if own:
            kind = "trained" if any(p.requires_grad for p in own.values()) else "frozen"
            parts.append(Part(name, _count(own), kind, "generator", what))
    assert sum(part.count for part in parts) == _count(parameters), "each belongs to one part"
    buffers = {n: b for n, b in vqrae.named_buffers() if b.is_floating_point()}
    what = "mean and scale of the features" if config.standardization == "calibrated" else ""
    if not config.use_simvq:
        what = f"EMA codebook: {codes:,} codes of {dim}, sums and counts" + (what and f"; {what}")
    if buffers:
        parts.append(Part("buffers", _count(buffers), "buffers", "none", what))
    return parts


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _note_on_the_encoder(vqrae: nn.Module, config: ModelConfig) -> str:
    """The size of the 6B that is quoted most counts a norm that its checkpoint does not have."""
    names = [name for name, _ in vqrae.encoder.model.named_parameters()]
    if config.encoder_shape.model_type != "internvl_vision" or "layernorm.weight" in names:
        return ""
    count = _count(dict(vqrae.encoder.named_parameters()))
    more = 2 * config.encoder_shape.hidden_size
    return (
        f"transformers counts {count + more:,} for the encoder where it adds a final LayerNorm "
        f"({more:,}), which the published one does not have"
    )


def _zero_stage(deepspeed: Mapping[str, Any]) -> int:
    return deepspeed["zero_optimization"]["stage"]


def _parameter_bytes(deepspeed: Mapping[str, Any], zero_stage: int) -> ParameterBytes:
    bf16 = get(deepspeed, "bf16.enabled") or False
    parameter = BF16 if bf16 else FP32
    state = BF16 if get(deepspeed, "bf16.bf16_master_weights_and_grads") else FP32
    dtype = get(deepspeed, "data_types.grad_accum_dtype")
    gradient = {None: parameter, "bf16": BF16, "fp32": FP32}[dtype]
    if zero_stage == 1 and gradient > parameter:
        gradient += parameter  # DeepSpeed's optimizer for this pair keeps both
    if get(deepspeed, "zero_optimization.offload_optimizer") is not None:
        return ParameterBytes(parameter, 0, 0, 0)  # the rest is in the host's memory
    params = deepspeed["optimizer"]["params"]
    moments = 2 if deepspeed["optimizer"]["type"] == "AdamW" else params.get("momentum", 0) > 0
    return ParameterBytes(parameter, gradient, state, moments * state)


def _bytes(part: Part, deepspeed: Mapping[str, Any], gpus: int) -> float:
    if part.engine == "none":
        return part.count * FP32
    if part.engine == "discriminator":  # as `engines.build_discriminator` configures it
        enabled = get(deepspeed, "bf16.enabled") or False
        changes = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": enabled}}
        deepspeed = {**deepspeed, **changes}
    stage = _zero_stage(deepspeed)
    size = _parameter_bytes(deepspeed, stage)
    whole, divided = size.parameter, 0
    if part.kind == "trained":
        whole, divided = size.parameter + size.gradient, size.master + size.optimizer
        if stage == 2:
            whole, divided = size.parameter, size.gradient + divided
    node = get(deepspeed, "zero_optimization.zero_hpz_partition_size") or 1
    if stage == 3 and part.engine != "resident":
        in_node = size.parameter / node if node > 1 else 0
        whole, divided = in_node, whole + divided
    return part.count * (whole + divided / gpus)


def _describe_bytes(deepspeed: Mapping[str, Any]) -> str:
    size = _parameter_bytes(deepspeed, _zero_stage(deepspeed))
    parts = (
        f"{size.parameter} itself",
        f"{size.gradient} gradient",
        f"{size.master} {'bf16' if size.master == BF16 else 'fp32'} master",
        f"{size.optimizer} {deepspeed['optimizer']['type']}",
    )
    return f"{' + '.join(parts)} = {sum(size)}, a frozen one {size.parameter}"


def _way_out(plan: Plan, gpu_memory: float) -> str:
    """The smallest number of GPUs that the batch can be divided by and the states fit on."""
    micro_batches = plan.run.schedule.batch.global_batch // plan.run.schedule.batch.micro_batch
    for gpus in (n for n in range(1, micro_batches + 1) if micro_batches % n == 0):
        size = sum(state_bytes(plan, gpus)) / GB
        if size <= gpu_memory:
            return f"that does not fit; from {gpus} GPUs on the states do: {size:.1f} GB a GPU"
    return (
        f"that does not fit on any number of GPUs up to {gpus}, where the states are "
        f"{size:.1f} GB a GPU: ZeRO-{_zero_stage(plan.run.deepspeed)} keeps some of them whole"
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of text; those of numbers are aligned at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = "<>><><"
    return [
        "  ".join(
            f"{cell:{a}{w}}" for cell, a, w in zip(row, aligned, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
