"""The parts of a run, by number of parameters: what is trained or frozen, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn

from vqrae_ds.config import LossConfig, ModelConfig, Run
from vqrae_ds.config.deepspeed_json import get
from vqrae_ds.models.discriminator import build_discriminator
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.parallel.slices import Place, own_shape, split_of

VGG16_CONVOLUTIONS, LPIPS_HEADS = 14_714_688, 64 + 128 + 256 + 512 + 512
CONVNEXT_S = 50_223_688
PERSISTENT_DEFAULT = 100_000  # stage3_param_persistence_threshold in DeepSpeed's zero/config.py

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
    own: int | None = None  # of `count` on each rank, where a tensor-parallel group divides them

    @property
    def held(self) -> int:
        """What a rank holds before ZeRO divides it."""
        return self.count if self.own is None else self.own


class Plan(NamedTuple):
    """All parts of a run, and what its DeepSpeed JSON does with them."""

    run: Run
    parts: tuple[Part, ...]
    note: str  # on the size of the encoder, where other sources count it otherwise
    largest_block: int = 0  # parameters of the largest block or layer of the generator
    persistent: int = 0  # parameters so small that ZeRO-3 keeps them whole
    encoder_blocks: float = 1.0  # share of the encoder's parameters that is in its blocks
    decoder_blocks: float = 1.0

    def count(self, kind: str) -> int:
        """The number of parameters that are `trained` or `frozen`."""
        return sum(part.count for part in self.parts if part.kind == kind)

    @property
    def tensor_size(self) -> int:
        """Ranks of a tensor-parallel group."""
        return self.run.schedule.batch.tensor_size


def plan(run: Run) -> Plan:
    """The plan of a run; `read_run(..., check_paths=False)` reads one without data and weights."""
    config = run.config
    with torch.device("meta"):
        vqrae = VQRAE(config=config.model, freeze_encoder=config.stage == 1)
    parts = _parts_of_vqrae(vqrae, config.model, run.schedule.batch.tensor_size)
    if config.losses.distillation is not None:  # with a weight of 0 it serves validation
        teacher = Part("teacher", parts[0].count, "frozen", "generator", "the encoder as it began")
        parts.insert(1, teacher)
    if config.memory.frozen_encoder == "resident":
        frozen = [part for part in parts[:2] if part.name in ("encoder", "teacher")][-1]
        if frozen.kind == "frozen":
            parts[parts.index(frozen)] = frozen._replace(engine="resident")
    parts += _parts_of_losses(config.losses)
    stacks = (vqrae.encoder.model.get_submodule(vqrae.encoder.blocks_path), vqrae.decoder.blocks)
    layers = [block for stack in stacks for block in stack]
    layers += [module for module in vqrae.modules() if not list(module.children())]
    largest = max(_count(dict(layer.named_parameters())) for layer in layers)
    whole = (_count(dict(m.named_parameters())) for m in (vqrae.encoder, vqrae.decoder))
    shares = [
        _count(dict(stack.named_parameters())) / count
        for stack, count in zip(stacks, whole, strict=True)
    ]
    note = _note_on_the_encoder(vqrae, config.model)
    return Plan(run, tuple(parts), note, largest, _persistent(vqrae, run), *shares)


def _persistent(vqrae: VQRAE, run: Run) -> int:
    """Parameters of the generator's engine that are at most as large as ZeRO-3's threshold."""
    given = get(run.deepspeed, "zero_optimization.stage3_param_persistence_threshold")
    threshold = PERSISTENT_DEFAULT if given is None else given
    resident = run.config.memory.frozen_encoder == "resident"
    copies = {"encoder.": 1}  # the teacher is a second encoder
    if run.config.losses.distillation is not None:
        copies["encoder."] += not resident
    elif run.config.stage == 1:
        copies["encoder."] -= resident
    return sum(
        p.numel() * next((n for prefix, n in copies.items() if name.startswith(prefix)), 1)
        for name, p in vqrae.named_parameters()
        if p.numel() <= threshold
    )


def _parts_of_losses(losses: LossConfig) -> list[Part]:
    """The networks that judge images."""
    parts, gan = [], losses.adversarial
    if gan is not None and gan.weight > 0:
        with torch.device("meta"):
            discriminator = build_discriminator(gan)
        what = f"{gan.num_layers} layers from {gan.channels} channels, under ZeRO-1"
        count = _count(dict(discriminator.named_parameters()))
        parts.append(Part("discriminator", count, "trained", "discriminator", what))
    if losses.perceptual is not None:
        what = f"VGG16 {VGG16_CONVOLUTIONS:,} + heads {LPIPS_HEADS:,}, in fp32"
        parts.append(Part("LPIPS", VGG16_CONVOLUTIONS + LPIPS_HEADS, "frozen", "none", what))
    if losses.convnext is not None:
        parts.append(Part("ConvNeXt-S", CONVNEXT_S, "frozen", "none", "in fp32"))
    return parts


def _parts_of_vqrae(vqrae: VQRAE, config: ModelConfig, tensor_size: int) -> list[Part]:
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
            held = _held(own, tensor_size) if tensor_size > 1 else None
            parts.append(Part(name, _count(own), kind, "generator", what, held))
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


def _held(parameters: Mapping[str, torch.Tensor], tensor_size: int) -> int:
    """Values on the first rank of a tensor-parallel group, which holds no fewer than the others."""
    first, held = Place(0, tensor_size), 0
    for name, parameter in parameters.items():
        split = split_of(name)
        shape = parameter.shape if split is None else own_shape(parameter.shape, split, first)
        held += torch.Size(shape).numel()
    return held


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
