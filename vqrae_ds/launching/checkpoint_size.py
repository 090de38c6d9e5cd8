"""How large a checkpoint of a run will be, from its two files alone and without torch.

`planning` counts exactly, on networks that torch builds. These formulas are within a percent of it,
for a check that must be done in seconds.

Widths: h of the encoder, w of the decoder, d of the codes; i is the width inside an MLP.
"""

from __future__ import annotations

from typing import NamedTuple

from vqrae_ds.config import AdversarialConfig, DecoderConfig, Run
from vqrae_ds.config.deepspeed_json import get

FP32, BF16 = 4, 2


class Counts(NamedTuple):
    """Parameters by what a checkpoint holds of them."""

    trained: int  # by the generator's engine, on all ranks of a tensor-parallel group together
    frozen: int  # SimVQ's codebook, which is merged
    pretrained: int  # the frozen encoder, the teacher: in no checkpoint, but once in the run
    buffers: int  # values, in fp32, of one rank
    discriminator: int


def checkpoint_bytes(run: Run, counts: Counts | None = None) -> int:
    """Bytes of one checkpoint, to within a few percent; some 0.1 MB a rank come on top.

    Without `counts` they are those of `count_parameters`.

    A trained parameter is stored as master and moments (`zero_pp_rank_*_optim_states.pt`), and
    below ZeRO-3 once more in its own dtype; a frozen one in its own dtype; EMA adds fp32. Ranks of
    a tensor-parallel group write what is whole on each of them once each. Buffers are in the files
    of modules: under ZeRO-3 every rank writes one, else one rank for each slice.
    """
    counts, json = counts or count_parameters(run), run.deepspeed
    own = BF16 if run.bf16 else FP32
    state = BF16 if get(json, "bf16.bf16_master_weights_and_grads") else FP32
    params = get(json, "optimizer.params") or {}
    is_adam = get(json, "optimizer.type") == "AdamW"
    moments = 2 if is_adam else int(bool(params.get("momentum", 0)))
    is_partitioned = get(json, "zero_optimization.stage") == 3
    again = 0 if is_partitioned else own
    average = FP32 if run.config.ema is not None else 0
    trained = counts.trained * ((1 + moments) * state + again + average)
    discriminator = counts.discriminator * ((1 + moments) * FP32 + own)
    batch = run.schedule.batch
    modules = batch.world_size if is_partitioned else batch.tensor_size
    buffers = modules * counts.buffers * FP32
    return trained + discriminator + counts.frozen * own + buffers


def pretrained_bytes(run: Run) -> int:
    """Bytes of the frozen pretrained weights, which a run writes once (`checkpoint.frozen`)."""
    return count_parameters(run).pretrained * (BF16 if run.bf16 else FP32)


def count_parameters(run: Run) -> Counts:
    """The parameters of a run; norms and biases inside blocks are counted as LayerNorm's."""
    model, losses = run.config.model, run.config.losses
    shape, decoder = model.encoder_shape, model.decoder
    h, w, d = shape.hidden_size, decoder.hidden_size, model.embedding_dim
    positions = (shape.image_size // shape.patch_size) ** 2 + 1
    encoder = _blocks(model.feature_layer, h, shape.intermediate_size)
    encoder += h * (3 * shape.patch_size**2 + positions)
    ours = _blocks(decoder.num_layers, w, decoder.intermediate_size)
    ours += w * (model.grid_side**2 + 3 * model.output_patch_size**2)
    if model.use_projections:
        ours += (h + 1) * d + (d + 1) * w
    codebook, buffers = model.num_embeddings * d, 2 * h
    if model.use_simvq:
        ours += d * d + d
    else:  # codes and their sums
        codebook, buffers = 0, 2 * codebook + buffers
    teacher = encoder if losses.distillation is not None else 0
    is_trained = run.config.stage == 2
    trained = ours + (encoder if is_trained else 0)
    group = run.schedule.batch.tensor_size
    return Counts(
        trained=group * trained - (group - 1) * _divided(decoder),
        frozen=codebook,
        pretrained=teacher + (0 if is_trained else encoder),
        buffers=buffers,
        discriminator=_discriminator(losses.adversarial),
    )


def _blocks(number: int, width: int, inner: int) -> int:
    """Attention, MLP, two norms and two LayerScales, with biases."""
    return number * (4 * width**2 + 2 * width * inner + 10 * width + inner)


def _divided(decoder: DecoderConfig) -> int:
    """What `parallel.slices` divides of the decoder: weights, and the biases of first layers."""
    w, i = decoder.hidden_size, decoder.intermediate_size
    return decoder.num_layers * (4 * w**2 + 2 * w * i + 3 * w + i)


def _discriminator(config: AdversarialConfig | None) -> int:
    """The convolutions of `models.discriminator`; its norms are too small to count."""
    if config is None or config.weight == 0:
        return 0
    first = config.channels
    if config.discriminator == "blur_pool":
        widths = [first, *(first * 2**i for i in range(config.num_layers))]
        ends = 3 * first * 5**2 + widths[-1] ** 2 + widths[-1] * 5**2
        kernel = 3
    else:
        widths = [first * min(2**i, 8) for i in range(config.num_layers + 1)]
        ends = (3 * first + widths[-1]) * 4**2
        kernel = 4
    inside = sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))
    return ends + inside * kernel**2
