"""What the tokenizer must know of an encoder's `config.json`, whatever its family; no torch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from vqrae_ds.config.checking import Positive, PositiveNumber, show

NormType = Literal["layer_norm", "rms_norm"]
ModelType = Literal["internvl_vision", "siglip_vision_model", "dinov2", "dinov2_with_registers"]

# With "wNorm" the features end in a LayerNorm without learned scale and shift; without it in the
# family's own last norm (InternViT has none). SigLIP 2 at fixed resolution is SigLIP's network.
EncoderName = Literal[
    "InternViT",
    "InternViTwNorm",
    "SigLIP",
    "SigLIPwNorm",
    "SigLIP2",
    "SigLIP2wNorm",
    "DINOv2",
    "DINOv2wNorm",
]
PLAIN_NORM = "wNorm"
MODEL_TYPES: dict[str, tuple[ModelType, ...]] = {
    "InternViT": ("internvl_vision",),
    "SigLIP": ("siglip_vision_model",),
    "SigLIP2": ("siglip_vision_model",),
    "DINOv2": ("dinov2", "dinov2_with_registers"),
}
IMPORT = "python tools/import_encoder.py SOURCE OUT makes a folder that fits"


class EncoderShape(BaseModel):
    """What the decoder mirrors; the rest of `config.json` is the encoder's own."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, protected_namespaces=())

    model_type: ModelType = "internvl_vision"
    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    intermediate_size: Positive
    image_size: Positive
    patch_size: Positive
    norm_type: NormType = "layer_norm"
    use_qk_norm: bool = False
    layer_scale_init_value: PositiveNumber = 0.1

    @model_validator(mode="before")
    @classmethod
    def _in_one_vocabulary(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The families' own words for the same things, and sides given as [height, width]."""
        model_type = raw.get("model_type", "internvl_vision")
        if model_type not in get_args(ModelType):
            raise ValueError(
                f"model_type = {show(model_type)} is not one of {', '.join(get_args(ModelType))}; "
                f"{IMPORT}"
            )
        renamed = dict(raw)
        for key in ("image_size", "patch_size"):
            if isinstance(side := raw.get(key), list | tuple):
                if len(side) != 2 or side[0] != side[1]:
                    raise ValueError(f"{key} = {show(side)} is not square: [side, side]")
                renamed[key] = side[0]
        if model_type == "siglip_vision_model":  # has no LayerScale: the decoder's begins at 1
            renamed["layer_scale_init_value"] = 1.0
        if model_type.startswith("dinov2"):
            renamed["layer_scale_init_value"] = raw.get("layerscale_value", 1.0)
            if isinstance(width := raw.get("hidden_size"), int):
                renamed["intermediate_size"] = int(width * raw.get("mlp_ratio", 4))
        return renamed


class EncoderChoice(NamedTuple):
    """A name of `EncoderName` taken apart."""

    family: str  # a key of MODEL_TYPES
    plain_norm: bool


def choose_encoder(name: EncoderName) -> EncoderChoice:
    """What an encoder's name says."""
    return EncoderChoice(name.removesuffix(PLAIN_NORM), name.endswith(PLAIN_NORM))


def check_family(name: EncoderName, shape: EncoderShape, where: str) -> None:
    """Raise `ValueError` where the configuration in `where` is not of the named family."""
    fitting = MODEL_TYPES[choose_encoder(name).family]
    if shape.model_type not in fitting:
        others = [family for family, types in MODEL_TYPES.items() if shape.model_type in types]
        raise ValueError(
            f"model.encoder_cls = {show(name)} does not fit model_type {show(shape.model_type)} "
            f"in {where}: that is {' or '.join(others)}"
        )


def count_blocks(feature_layer: int, shape: EncoderShape) -> int:
    """The number of blocks up to the features: 1 to n as they count, -1 the last, -n the first.

    Raises `ValueError` for a block that the encoder does not have.
    """
    n = shape.num_hidden_layers
    if feature_layer == 0 or not -n <= feature_layer <= n:
        raise ValueError(
            f"model.feature_layer = {feature_layer} is no block of the encoder: "
            f"1 to {n} from the first, -1 to -{n} from the last"
        )
    return feature_layer if feature_layer > 0 else n + 1 + feature_layer
