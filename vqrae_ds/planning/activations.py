"""Activations of a micro step on one GPU, part by part, and the most of them at once.

T tokens of the micro batch, D width of the encoder, E of the codes, P values a patch.
"""

from __future__ import annotations

from typing import NamedTuple

from vqrae_ds.config import ModelConfig, Run
from vqrae_ds.ops import code_distances
from vqrae_ds.ops.nearest_code import TILE_CODES, TILE_NORMS, TILE_TOKENS
from vqrae_ds.planning.blocks import (
    FP32,
    Block,
    backward_bytes,
    forward_bytes,
    kept_bytes,
    norm_bytes,
)
from vqrae_ds.planning.image_networks import convnext_bytes, discriminator_bytes, lpips_bytes

BF16, FP64 = 2, 8


class Activations(NamedTuple):
    """Bytes by part.

    Those `kept` live together until the generator's backward pass; of `passing` one at a time comes
    on top; `after` is the discriminator's own step, when the generator keeps its codes alone.
    """

    kept: dict[str, float]
    passing: dict[str, float]
    after: float

    @property
    def most(self) -> float:
        """The peak: all that is kept and the largest of what passes, or what comes after."""
        return max(sum(self.kept.values()) + max(self.passing.values()), self.after)


def activations(run: Run) -> Activations:
    """The activations of a micro batch of `run` on a GPU.

    The image losses come after the whole forward pass and are freed before the generator's
    backward pass. The discriminator's own step comes last, of real and reconstructed images
    at once.
    """
    config, model, memory = run.config, run.config.model, run.config.memory
    images, size = run.schedule.batch.micro_batch, value_size(run)
    encoder, decoder = encoder_block(model, images, size), decoder_block(model, images, size)
    distillation = config.losses.distillation
    kept, passing = {}, {}
    backward = [backward_bytes(decoder, memory.decoder_checkpointing)]
    if config.stage == 2:
        each = kept_bytes(encoder, memory.encoder_checkpointing)
        kept["encoder"] = model.feature_layer * each
        backward.append(backward_bytes(encoder, memory.encoder_checkpointing))
    if config.stage == 1 or (distillation is not None and distillation.teacher.weight > 0):
        passing["frozen encoder, forward"] = forward_bytes(encoder)
    each = kept_bytes(decoder, memory.decoder_checkpointing)
    kept["decoder"] = model.decoder.num_layers * each + head_bytes(model, images, size)
    kept["features, codes, pixels"] = _between(run, images, size)
    tensor_size = run.schedule.batch.tensor_size
    codes = code_bytes(model, size, tensor_size)
    kept["projected codes"] = codes
    passing["nearest codes"] = search_bytes(model, images, size, tensor_size)
    passing["backward of a block"] = max(backward)
    passing |= _image_losses(run, images, size)
    return Activations(kept, passing, codes + 2 * passing.get("discriminator", 0.0))


def value_size(run: Run) -> int:
    """Bytes of a value in the generator: 2 in bf16, else 4."""
    return BF16 if run.bf16 else FP32


def decoder_block(model: ModelConfig, images: int, size: int, *, on_gpu: bool = True) -> Block:
    """The shape of a block of models/decoder.py for a micro batch of `images`."""
    decoder = model.decoder
    norm = "kernel" if on_gpu or decoder.norm_type == "layer_norm" else "steps"
    qk_norm = "kernel" if on_gpu else "steps"
    return Block(
        tokens=images * model.grid_side**2,
        width=decoder.hidden_size,
        heads=decoder.num_heads,
        mlp_products=decoder.intermediate_size,
        mlp_others=decoder.intermediate_size,
        norm=norm,
        qk_norm=qk_norm if decoder.use_qk_norm else None,
        layer_scale=True,
        one_qkv=True,
        size=size,
    )


def encoder_block(model: ModelConfig, images: int, size: int) -> Block:
    """The shape of a block of the transformers library's encoder.

    Queries, keys and values are three products there, and SigLIP has no LayerScale. Each image has
    a class token, and DINOv2 registers as well.
    """
    shape, raw = model.encoder_shape, model.encoder_config
    extra = 0 if shape.model_type == "siglip_vision_model" else 1
    if shape.model_type == "dinov2_with_registers":
        extra += raw.get("num_register_tokens", 4)
    products = others = shape.intermediate_size
    if raw.get("use_swiglu_ffn"):  # two halves of one product; then SiLU of one, and their product
        inner = (shape.intermediate_size * 2 // 3 + 7) // 8 * 8
        products = others = 2 * inner
    return Block(
        tokens=images * (model.grid_side**2 + extra),
        width=shape.hidden_size,
        heads=shape.num_attention_heads,
        mlp_products=products,
        mlp_others=others,
        norm="library" if shape.norm_type == "rms_norm" else "kernel",
        qk_norm="library" if shape.use_qk_norm else None,
        layer_scale=shape.model_type != "siglip_vision_model",
        one_qkv=False,
        size=size,
    )


def head_bytes(model: ModelConfig, images: int, size: int, *, on_gpu: bool = True) -> float:
    """What the decoder keeps behind its blocks: input and output of its norm, and the patches."""
    block = decoder_block(model, images, size, on_gpu=on_gpu)
    from_norm = norm_bytes(block, block.norm)
    return from_norm + block.tokens * 3 * model.output_patch_size**2 * size


def code_bytes(model: ModelConfig, size: int, tensor_size: int = 1) -> float:
    """SimVQ's projected codes of a rank and their norms, which live from step to step."""
    if not model.use_simvq:
        return 0.0
    return -(-model.num_embeddings // tensor_size) * (model.embedding_dim * size + FP32)


def search_bytes(model: ModelConfig, images: int, size: int, tensor_size: int = 1) -> float:
    """The search of the nearest codes beside `code_bytes`, without gradient, at its worst.

    That is in PyTorch: the kernels of ops/nearest_code_triton.py take next to nothing. It goes tile
    by tile, some tokens go through float64, and a tensor-parallel group compares its winners.
    """
    tokens = images * model.grid_side**2
    codes, width = -(-model.num_embeddings // tensor_size), model.embedding_dim
    tile = min(TILE_TOKENS, tokens)
    searches = [screening_bytes(tile, codes, width, size), float64_bytes(tile, codes, width, size)]
    if tensor_size > 1:
        searches.append(group_bytes(tokens, width, size, tensor_size))
    return max(searches)


def screening_bytes(n: int, codes: int, width: int, size: int) -> float:
    """A tile of n tokens against a tile of codes in bf16.

    It moves and rounds the tokens, then the codes, and makes of both products and scores.
    """
    k = min(TILE_CODES, codes)
    tokens = (2 * FP32 + BF16) * n * width
    moved = FP32 + (FP32 if size < FP32 else BF16)  # of a code, in fp32 and to or from bf16
    new_codes = BF16 * n * width + moved * k * width
    scores = BF16 * n * width + (BF16 + FP32) * n * k
    norms = (FP32 + moved) * min(TILE_NORMS, codes) * width
    return max(tokens, new_codes, scores, norms)


def float64_bytes(n: int, codes: int, width: int, size: int) -> float:
    """The tokens of a tile that are left, gathered and moved; codes and squares, or new scores."""
    k = min(code_distances.TILE_CODES, codes)
    tokens = (size + FP64) * n * width
    return tokens + FP64 * max(2 * k * width + n * k, k * width + 2 * n * k)


def group_bytes(tokens: int, width: int, size: int, tensor_size: int) -> float:
    """The distances of this rank's winners, tile by tile, or all ranks' winners.

    A token has an index, a distance and its own number, then those of each rank: both as they came,
    the index as such, whether it ties, and the index where it does.
    """
    tile = min(TILE_TOKENS, tokens) * width * (size + FP64)
    return max(3 * FP64 * tokens + tile, (5 * FP64 + (4 * FP64 + 1) * tensor_size) * tokens)


def _between(run: Run, images: int, size: int) -> float:
    """What lies between encoder and decoder, and behind the head.

    D: the features, and standardised. E: what is quantised, code and its frozen vector, the value
    behind the straight-through step; four copies in fp32 for both sides of the loss. Distillation
    compares in fp32 as well. Pixels in fp32: input, patches, image, gradient, and their product.
    """
    config, model = run.config, run.config.model
    T, D, E = images * model.grid_side**2, model.encoder_shape.hidden_size, model.embedding_dim
    size_of_token = 2 * D * size + 4 * E * size + 4 * E * FP32
    distillation = config.losses.distillation
    if distillation is not None:
        size_of_token += 2 * E * FP32 if distillation.quantized.weight else 0
        size_of_token += D * size + 2 * D * FP32 if distillation.teacher.weight else 0
    return T * size_of_token + 5 * images * 3 * model.image_size**2 * FP32


def _image_losses(run: Run, images: int, size: int) -> dict[str, float]:
    """LPIPS and ConvNeXt are differentiated together, the discriminator on its own."""
    losses, side = run.config.losses, run.config.model.image_size
    judged = 0.0
    if losses.perceptual is not None and losses.perceptual.weight > 0:
        judged += lpips_bytes(images, side)
    if losses.convnext is not None and losses.convnext.weight > 0:
        judged += convnext_bytes(images)
    passing = {"LPIPS and ConvNeXt": judged} if judged else {}
    gan = losses.adversarial
    if gan is not None and gan.weight > 0:
        passing["discriminator"] = discriminator_bytes(gan, images, side, size)
    return passing
