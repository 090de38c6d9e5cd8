"""What a transformer block keeps in memory for its backward pass, from shapes alone.

One unit is the residual stream: tokens x width values. Weights are not counted, though linear
layers keep them too. What a product, a norm or an elementwise operation keeps follows from its
derivative: a linear layer its input, a norm input and output (which the next layer reads), GELU its
input, LayerScale what it scales (its factor is trained), attention queries, keys, values, its
output and a log-sum-exp a query and head in fp32. No matrix of tokens x tokens is kept: PyTorch's
scaled_dot_product_attention takes a flash kernel, on CPUs as well, and its backward pass computes
the matrix tile by tile (arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vqrae_ds.models.activation_checkpointing import Checkpointing

FP32 = 4

# How a norm is computed. PyTorch has one kernel for LayerNorm everywhere and for RMSNorm on GPUs:
# `kernel`. On CPUs its RMSNorm is made of `steps` that each keep their result, and the transformers
# library's RMSNorm is made of steps on every device: `library`.
Norm = Literal["kernel", "steps", "library"]


class Block(NamedTuple):
    """The shape of a pre-norm transformer block on one micro batch.

    `mlp_products` are the values a token that the first layer of the perceptron makes, `mlp_others`
    those of what follows up to the second layer: the inner width each for GELU. `norm` is that of
    the residual stream, `qk_norm` that of queries and keys. `one_qkv` says that one product makes
    queries, keys and values: they share their memory.
    """

    tokens: int  # of all images of the micro batch
    width: int
    heads: int
    mlp_products: int
    mlp_others: int
    norm: Norm
    qk_norm: Norm | None
    layer_scale: bool
    one_qkv: bool
    size: int  # bytes of a value: 2 or 4


def kept_bytes(block: Block, policy: Checkpointing) -> float:
    """Bytes that one block keeps from the forward to the backward pass, its input included.

    Its output is the next one's input. Under `full` that is all. `selective` keeps the results of
    matrix products and of attention beside it, and nothing between them.
    """
    stream = block.tokens * block.width * block.size
    if policy == "full":
        return stream
    attention = 3 * stream + stream + block.tokens * block.heads * FP32
    products = block.tokens * block.mlp_products * block.size
    if policy == "selective":  # the products behind attention and perceptron as well
        return stream + attention + stream + products + stream
    perceptron = products + block.tokens * block.mlp_others * block.size
    scaled = 2 * stream if block.layer_scale else 0
    return 2 * norm_bytes(block, block.norm) + attention + _of_qk_norms(block) + perceptron + scaled


def backward_bytes(block: Block, policy: Checkpointing) -> float:
    """Bytes that the backward pass of one block needs beside what all blocks keep.

    What was not kept is computed once more. Then come gradients, the most of them at the
    perceptron: of its input and output inside, of the residual stream and of the branch; and the
    gradient of the largest weight until it is in the bucket.
    """
    again = kept_bytes(block, "none") - kept_bytes(block, policy)
    inner = block.mlp_products + block.mlp_others
    gradients = block.tokens * (inner + 2 * block.width) * block.size
    return again + gradients + block.width * block.mlp_products * block.size


def forward_bytes(block: Block) -> float:
    """Bytes at the widest point of a block that runs without gradient.

    In the transformers library's layers that is the perceptron, both sides of its activation, or
    attention with queries, keys, values and result. Beside it the layer's own variables still hold
    five values of the residual stream's width: its input, attention's result before and after its
    scale, their sum, and the norm of that.
    """
    stream = block.tokens * block.width * block.size
    inner = block.tokens * (block.mlp_products + block.mlp_others) * block.size
    return 5 * stream + max(inner, 4 * stream)


def norm_bytes(block: Block, norm: Norm) -> float:
    """Bytes that a norm of the residual stream keeps, its input and output included.

    `kernel`: both, and mean and inverse deviation a token. The others raise bf16 to fp32 first and
    keep that instead of their input; the normed values too, in fp32 or, `library`, in bf16.
    """
    values = block.tokens * block.width
    if norm == "kernel":
        return 2 * values * block.size + 2 * block.tokens * FP32
    if block.size == FP32:
        return 3 * values * FP32
    return values * (FP32 + (FP32 if norm == "steps" else block.size) + block.size)


def _of_qk_norms(block: Block) -> float:
    """What the norms of queries and keys add to those that are kept anyway.

    The product's result is freed once both are raised to fp32, unless the values are in it too.
    Their order differs from that of the heads then, and attention's output is copied for the next
    product.
    """
    if block.qk_norm is None:
        return 0
    stream = block.tokens * block.width * block.size
    own = norm_bytes(block, block.qk_norm) - stream
    if block.qk_norm == "kernel":
        own += 2 * block.tokens * (block.heads - 1) * FP32
    if not block.one_qkv:
        return 2 * own
    keeps_product = block.qk_norm == "steps" and block.size < FP32
    return 2 * (own + keeps_product * stream) + stream
