"""Model FLOPs of a training step, from the configuration alone; imports no torch.

A multiply-add is 2 FLOPs. The forward of a transformer block of width D and inner width I, on T
tokens, has 2 T (4 D^2 + 2 D I) in its matrix products and 4 T^2 D in the attention. The backward is
twice the forward: a gradient for the weights, and one for the inputs. Where a gradient is not
needed it is not counted: all of a frozen encoder, and the inputs of the first trained layer.

Norms, activations and other elementwise work are not counted, nor are LPIPS, ConvNeXt and the
discriminator; nor is what activation checkpointing computes twice. So the share of the peak is an
MFU (arXiv:2204.02311, appendix B), not an HFU. Likewise what every rank of a tensor-parallel group
runs counts once; `repeated_flops` has the rest.

T tokens an image, D width, I inner width, K codes of E dimensions, P values a patch.
"""

from __future__ import annotations

from vqrae_ds.config import ModelConfig, Run
from vqrae_ds.config.deepspeed_json import BatchArithmetic
from vqrae_ds.config.encoder import EncoderShape

FORWARD, FORWARD_AND_WEIGHTS, WHOLE_STEP = 1, 2, 3


def flops_per_image(run: Run) -> float:
    """FLOPs that a training step takes for each image of the batch."""
    return float(_divided(run) + _undivided(run))


def repeated_flops(run: Run) -> float:
    """FLOPs an image that the other ranks of a tensor-parallel group compute as well as the first.

    That is all but the decoder's blocks and the search of the codes, and the forward of the codes'
    projection, which a rank that is alone has from its search; 0 for such a one. What checkpointing
    computes is in `recomputed_flops`.
    """
    size, model = run.schedule.batch.tensor_size, run.config.model
    flops = (size - 1) * _undivided(run)
    if size > 1 and model.use_simvq:  # none has searched all codes, so each projects the chosen
        flops += size * _linear(model.grid_side**2, model.embedding_dim, model.embedding_dim)
    return float(flops)


def _divided(run: Run) -> float:
    """What the ranks of a tensor-parallel group share (`parallel.slices`), for each image."""
    model, decoder = run.config.model, run.config.model.decoder
    mlp_weights = 2 * decoder.hidden_size * decoder.intermediate_size
    block = _block(model.grid_side**2, decoder.hidden_size, mlp_weights)
    return WHOLE_STEP * decoder.num_layers * block + _search(model, run.schedule.batch)


def _undivided(run: Run) -> int:
    """What each rank of such a group runs whole: encoder, teacher, projections, head."""
    config, model, decoder = run.config, run.config.model, run.config.model.decoder
    T, D, E = model.grid_side**2, model.encoder_shape.hidden_size, model.embedding_dim
    decoder_D, P = decoder.hidden_size, 3 * model.output_patch_size**2
    trains_encoder = config.stage == 2
    embedding, blocks = _patch_embedding(model), _encoder_blocks(model)
    flops = embedding + blocks
    if trains_encoder:  # images have no gradient
        flops = FORWARD_AND_WEIGHTS * embedding + WHOLE_STEP * blocks
    distillation = config.losses.distillation
    if distillation is not None and distillation.teacher.weight > 0:
        flops += embedding + blocks
    if model.use_projections:
        flops += (WHOLE_STEP if trains_encoder else FORWARD_AND_WEIGHTS) * _linear(T, D, E)
        flops += WHOLE_STEP * _linear(T, E, decoder_D)
    if model.use_simvq:  # the weights' gradient alone: codes are frozen, values from the search
        flops += _linear(T, E, E)
    return flops + WHOLE_STEP * _linear(T, decoder_D, P)


def encoder_flops(run: Run) -> float:
    """FLOPs of one pass of the encoder over an image."""
    return float(_patch_embedding(run.config.model) + _encoder_blocks(run.config.model))


def recomputed_flops(run: Run) -> float:
    """FLOPs an image that `full` activation checkpointing computes twice: blocks that train.

    Those of the encoder count for each rank of a tensor-parallel group. `selective` keeps the
    results of all matrix products and of attention.
    """
    config, model, decoder = run.config, run.config.model, run.config.model.decoder
    flops = 0
    if config.stage == 2 and config.memory.encoder_checkpointing == "full":
        flops += run.schedule.batch.tensor_size * _encoder_blocks(model)
    if config.memory.decoder_checkpointing == "full":
        mlp_weights = 2 * decoder.hidden_size * decoder.intermediate_size
        block = _block(model.grid_side**2, decoder.hidden_size, mlp_weights)
        flops += decoder.num_layers * block
    return float(flops)


def _linear(tokens: int, width_in: int, width_out: int) -> int:
    return 2 * tokens * width_in * width_out


def _block(tokens: int, width: int, mlp_weights: int) -> int:
    """Forward of one block: four square matrices, the perceptron, and queries by keys by values."""
    return 2 * tokens * (4 * width**2 + mlp_weights) + 4 * tokens**2 * width


def _patch_embedding(model: ModelConfig) -> int:
    shape = model.encoder_shape
    return _linear(model.grid_side**2, 3 * shape.patch_size**2, shape.hidden_size)


def _encoder_blocks(model: ModelConfig) -> int:
    shape, raw = model.encoder_shape, model.encoder_config
    tokens = model.grid_side**2 + _extra_tokens(shape, raw)
    mlp_weights = 2 * shape.hidden_size * shape.intermediate_size
    if raw.get("use_swiglu_ffn"):  # Dinov2SwiGLUFFN of the transformers library: three matrices
        inner = (shape.intermediate_size * 2 // 3 + 7) // 8 * 8
        mlp_weights = 3 * shape.hidden_size * inner
    return model.feature_layer * _block(tokens, shape.hidden_size, mlp_weights)


def _extra_tokens(shape: EncoderShape, raw: dict) -> int:
    """Class and register tokens, which run through the blocks beside the patches."""
    if shape.model_type == "siglip_vision_model":
        return 0
    registers = raw.get("num_register_tokens", 4)
    return 1 + (registers if shape.model_type == "dinov2_with_registers" else 0)


def _search(model: ModelConfig, batch: BatchArithmetic) -> float:
    """SimVQ projects all codes once a step, and a token is compared with each of them.

    Moving averages sum the tokens of each code by a product with a one-hot matrix.
    """
    T, K, E = model.grid_side**2, model.num_embeddings, model.embedding_dim
    search = _linear(T, E, K)
    if not model.use_simvq:
        return search + _linear(T, E, K)
    return search + _linear(K, E, E) / (batch.micro_batch * batch.accumulation)
