"""The layouts in which pretrained vision encoders are published, and what they become here.

A layout says which tensors of a checkpoint are the vision tower, what the transformers library's
class calls them, and how the configuration reads there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from vqrae_ds.config.checking import check, show
from vqrae_ds.config.encoder import EncoderShape

_BACKBONE_FIELDS = ("_out_features", "_out_indices", "apply_layernorm", "reshape_hidden_states")
_FIXED = {"use_mask_token": False, "vision_use_head": False}  # parts that give no features
_CLASS_QK_NORM_EPS = 1e-6  # InternVLVisionAttention takes none from the configuration


class Origin(NamedTuple):
    """Where a parameter is in the source: one of `parts` equal blocks of a tensor's rows."""

    name: str
    part: int = 0
    parts: int = 1


class Layout(NamedTuple):
    """One kind of checkpoint. `origins` and `blocks` name only what differs from the class."""

    family: str
    model_type: str  # of the class
    prefixes: tuple[str, ...] = ("",)  # of the tower's tensors; the first one that is in use
    unused: tuple[str, ...] = ()  # how names in the tower begin that are not imported
    others: tuple[str, ...] = ()  # how names beside the tower begin
    nested: str | None = None  # model_type of the `vision_config` inside, for a larger model
    origins: dict[str, Origin] = {}  # by the module of the class
    blocks: str = ""  # what the source calls the class's list of blocks
    keys: dict[str, tuple[str, Any]] = {}  # by the class's: the source's key and its default


class Tower(NamedTuple):
    """What an import makes: `config.json`, and the shape of every parameter of the class."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


# The publisher's words for InternViT, and the defaults of its class: 48 blocks at 224 pixels.
_INTERNVIT_KEYS = {
    "hidden_size": ("hidden_size", 3200),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "intermediate_size": ("intermediate_size", 12800),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "num_channels": ("num_channels", 3),
    "attention_bias": ("qkv_bias", False),
    "use_qk_norm": ("qk_normalization", True),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "layer_scale_init_value": ("initializer_factor", 0.1),
    "initializer_range": ("initializer_range", 0.02),
    "hidden_act": ("hidden_act", "gelu"),
    "attention_dropout": ("attention_dropout", 0.0),
    "projection_dropout": ("dropout", 0.0),
}

_INTERNVIT = Layout(
    family="InternViT",
    model_type="internvl_vision",
    blocks="encoder.layers",
    keys=_INTERNVIT_KEYS,
    origins={
        "embeddings.cls_token": Origin("embeddings.class_embedding"),
        "embeddings.position_embeddings": Origin("embeddings.position_embedding"),
        "embeddings.patch_embeddings.projection": Origin("embeddings.patch_embedding"),
        "layernorm_before": Origin("norm1"),
        "layernorm_after": Origin("norm2"),
        "lambda_1": Origin("ls1"),
        "lambda_2": Origin("ls2"),
        "attention.q_proj": Origin("attn.qkv", 0, 3),
        "attention.k_proj": Origin("attn.qkv", 1, 3),
        "attention.v_proj": Origin("attn.qkv", 2, 3),
        "attention.q_norm": Origin("attn.q_norm"),
        "attention.k_norm": Origin("attn.k_norm"),
        "attention.projection_layer": Origin("attn.proj"),
    },
)
_INTERNVL_VISION = Layout("InternViT", "internvl_vision", unused=("embeddings.mask_token",))
_SIGLIP = Layout(
    family="SigLIP",
    model_type="siglip_vision_model",
    prefixes=("vision_model.", ""),
    unused=("head.", "embeddings.position_ids"),  # the latter, 0 to N - 1, in old exports
)
_DINOV2 = Layout(
    family="DINOv2",
    model_type="dinov2",
    prefixes=("dinov2.", ""),
    unused=("embeddings.mask_token",),
    others=("classifier.",),
    origins={
        "attention.q_proj": Origin("attention.attention.query"),
        "attention.k_proj": Origin("attention.attention.key"),
        "attention.v_proj": Origin("attention.attention.value"),
        "attention.o_proj": Origin("attention.output.dense"),
        "mlp.gate_proj": Origin("mlp.weights_in", 0, 2),
        "mlp.up_proj": Origin("mlp.weights_in", 1, 2),
        "mlp.down_proj": Origin("mlp.weights_out"),
    },
)
LAYOUTS = {
    "intern_vit_6b": _INTERNVIT,
    "internvl_chat": _INTERNVIT._replace(
        prefixes=("vision_model.",), others=("language_model.", "mlp1."), nested="intern_vit_6b"
    ),
    "internvl_vision": _INTERNVL_VISION,
    "internvl": _INTERNVL_VISION._replace(
        prefixes=("model.vision_tower.", "vision_tower."),
        others=(
            "model.language_model.",
            "language_model.",
            "lm_head.",
            "model.multi_modal_projector.",
            "multi_modal_projector.",
        ),
        nested="internvl_vision",
    ),
    "siglip": _SIGLIP._replace(
        prefixes=("vision_model.",),
        others=("text_model.", "logit_scale", "logit_bias"),
        nested="siglip_vision_model",
    ),
    "siglip_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2._replace(
        family="DINOv2 with registers",
        model_type="dinov2_with_registers",
        prefixes=("dinov2_with_registers.", ""),
    ),
}


def find_layout(config: dict[str, Any], where: Path) -> Layout:
    """The layout of the checkpoint whose `config.json`, at `where`, is `config`.

    Raises `ValueError` for another kind of model.
    """
    model_type = config.get("model_type")
    if model_type in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"{where}: model_type {show(model_type)} is SigLIP 2 with patches of varying number "
            "(NaFlex), which is not supported. The checkpoints of SigLIP 2 at a fixed resolution, "
            'google/siglip2-large-patch16-256 for example, have model_type "siglip"'
        )
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise ValueError(
            f"{where}: model_type {show(model_type)} is not one of {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[model_type]


def build_tower(config: dict[str, Any], layout: Layout, where: Path) -> Tower:
    """The tower that `config` describes, in the vocabulary of the class.

    Raises `ValueError` for a configuration that the class does not take, or computes otherwise.
    """
    config_class, model_class = _classes(layout.model_type)
    given = _translate(_tower_section(config, layout, where), layout, where)
    # The fields of the class itself; those of its bases are of no meaning for the network.
    fields = [name for name in config_class.__annotations__ if name not in _BACKBONE_FIELDS]
    if layout.model_type == "siglip_vision_model" and "vision_use_head" not in fields:
        fields.append("vision_use_head")  # in transformers 5.20 the class reads it undeclared
    try:
        resolved = config_class(**{name: given[name] for name in fields if name in given})
    except StrictDataclassError as error:
        raise ValueError(f"{where}: {error}") from error
    values = {name: getattr(resolved, name) for name in fields}
    values = {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}
    ours = {"model_type": layout.model_type, **values}
    check(EncoderShape, ours, prefix=f"{where}: ")
    try:
        with torch.device("meta"):
            parameters = model_class(resolved).state_dict()
    except KeyError as error:
        raise ValueError(f"{where}: the transformers library knows no {error} for it") from error
    except ValueError as error:  # heads that do not divide the width
        raise ValueError(f"{where} is no configuration of {layout.family}: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    return Tower(ours, {n: s for n, s in shapes.items() if not n.startswith(layout.unused)})


def find_origin(name: str, layout: Layout) -> Origin:
    """Where the parameter `name` of the class is in the source, without the tower's prefix."""
    block, module, leaf = re.fullmatch(
        r"(encoder\.layers?\.\d+\.)?(.*?)(\.weight|\.bias)?", name
    ).groups(default="")
    origin = layout.origins.get(module, Origin(module))
    if block and layout.blocks:
        block = f"{layout.blocks}.{block.split('.')[2]}."
    return origin._replace(name=f"{block}{origin.name}{leaf}")


def _tower_section(config: dict[str, Any], layout: Layout, where: Path) -> dict[str, Any]:
    """The part of `config` that describes the tower; a `vision_config` names its deviations."""
    if layout.nested is None:
        return config
    section = config.get("vision_config") or {}
    if not isinstance(section, dict):
        raise ValueError(f"{where}: vision_config = {show(section)} must hold keys and values")
    model_type = section.get("model_type", layout.nested)
    if model_type != layout.nested:
        raise ValueError(
            f"{where}: vision_config.model_type is {show(model_type)}; in a checkpoint of "
            f"model_type {show(config['model_type'])} it must be {show(layout.nested)}"
        )
    return section


def _translate(section: dict[str, Any], layout: Layout, where: Path) -> dict[str, Any]:
    """`section` in the keys of the class, which knows the defaults of its own."""
    if not layout.keys:
        return section | _FIXED
    ours = {name: section.get(key, default) for name, (key, default) in layout.keys.items()}
    if ours["use_qk_norm"] and ours["layer_norm_eps"] != _CLASS_QK_NORM_EPS:
        raise ValueError(
            f"{where}: layer_norm_eps = {show(ours['layer_norm_eps'])} with qk_normalization: the "
            f"transformers library's class norms Q and K with {_CLASS_QK_NORM_EPS} only"
        )
    return ours | _FIXED


def _classes(model_type: str) -> tuple[type, type]:
    """Configuration and network of the transformers library, which takes seconds to import."""
    import transformers as tf

    return {
        "internvl_vision": (tf.InternVLVisionConfig, tf.InternVLVisionModel),
        "siglip_vision_model": (tf.SiglipVisionConfig, tf.SiglipVisionModel),
        "dinov2": (tf.Dinov2Config, tf.Dinov2Model),
        "dinov2_with_registers": (tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersModel),
    }[model_type]
