"""The configuration of the tokenizer itself; it travels with the weights as their `config.json`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vqrae_ds.config.checking import (
    Positive,
    PositiveNumber,
    Section,
    Text,
    Weight,
    check,
    nearest_multiples,
    show,
)
from vqrae_ds.config.encoder import (
    IMPORT,
    EncoderName,
    EncoderShape,
    NormType,
    check_family,
    count_blocks,
)
from vqrae_ds.config.files import read_json


class DecoderConfig(Section):
    """The ViT decoder. A field left out mirrors the encoder: the tokenizer is symmetric then."""

    hidden_size: Positive | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    intermediate_size: Positive | None = None
    norm_type: NormType | None = None
    # Per head, so that heads can be split over a tensor-parallel group.
    use_qk_norm: bool | None = None
    layer_scale_init_value: PositiveNumber | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        width, heads = self.hidden_size, self.num_heads
        if width and heads and width % heads:
            fitting = [n for n in range(1, min(width, 2 * heads) + 1) if width % n == 0]
            nearest = sorted(sorted(fitting, key=lambda n: abs(n - heads))[:3])
            raise ValueError(
                f"num_heads = {heads} does not divide hidden_size {width}; "
                f"these do: {', '.join(map(str, nearest))}"
            )
        return self


class ModelConfig(Section):
    """The tokenizer. `encoder_config_path` is a folder with a `config.json`, Hugging Face's layout.

    Once resolved (`resolve_model`) the encoder's configuration is inside instead of the path.
    """

    encoder_cls: EncoderName = "InternViT"
    encoder_config_path: Text | None = None
    encoder_config: dict[str, Any] | None = None
    # The block whose output is the feature: 1 to n, or -1 (the last) to -n. Those above are not
    # built. The 48-block InternViT is best at -4 (OpenGVLab's model card of the 224px version).
    feature_layer: int = -1
    # Side of the output, and of a token in it, in pixels. By default those of the encoder. Where
    # the token is larger or smaller than the encoder's patch, the encoder sees a resized image.
    image_size: Positive | None = None
    output_patch_size: Positive | None = None
    # InternViT ends without a norm: with an offset that all tokens share training begins with a
    # handful of codes. A LayerNorm works along the channels and does not take it out; it is there
    # to compare.
    standardization: Literal["calibrated", "layer_norm", "none"] = "calibrated"
    # Linear layers from the encoder's width to embedding_dim and on to the decoder's; without
    # them the three must be equal.
    use_projections: bool = True
    use_simvq: bool = True  # false: a codebook learned by moving averages, the plain baseline
    num_embeddings: Annotated[int, Field(ge=2)] = 16384
    embedding_dim: Positive = 1536
    commitment_cost: Weight = 0.25
    legacy: bool = True  # which side of the SimVQ loss the commitment cost scales (models/simvq.py)
    codebook_projection_bias: bool = True
    codebook_projection_init: Literal["linear", "identity", "orthogonal"] = "linear"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99  # of the moving averages, a micro batch
    decoder: DecoderConfig = DecoderConfig()

    @property
    def patch_size(self) -> int:
        """Side of the encoder's patches in pixels. Needs a resolved configuration."""
        return self.encoder_shape.patch_size

    @property
    def encoder_shape(self) -> EncoderShape:
        """The encoder in numbers. Needs a resolved configuration."""
        assert self.encoder_config is not None, "resolve_model comes first"
        return EncoderShape.model_validate(self.encoder_config)

    @property
    def grid_side(self) -> int:
        """Tokens a side at `image_size`. Needs a resolved configuration."""
        return self.image_size // self.output_patch_size

    @model_validator(mode="after")
    def _one_encoder(self) -> ModelConfig:
        if self.encoder_config_path is None and self.encoder_config is None:
            raise ValueError(
                "encoder_config_path is missing: name a folder with the encoder's config.json"
            )
        if self.encoder_config_path is not None and self.encoder_config is not None:
            raise ValueError(
                f"encoder_config_path = {show(self.encoder_config_path)} is set, and so is "
                "model.encoder_config: remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _options_of_the_quantizer(self) -> ModelConfig:
        """An option of the quantiser that is not used would be ignored."""
        for_simvq = ("legacy", "codebook_projection_bias", "codebook_projection_init")
        for name in ("ema_decay",) if self.use_simvq else for_simvq:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} = {show(getattr(self, name))} has no effect with model.use_simvq = "
                    f"{show(self.use_simvq)}: remove it"
                )
        return self


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Read the encoder's `config.json` and fill in what follows from it.

    Raises `ValueError` where the file, a key of it or a divisibility is missing.
    """
    if model.encoder_config_path is None:
        encoder, prefix = copy.deepcopy(model.encoder_config), "model.encoder_config."
    else:
        path = Path(model.encoder_config_path) / "config.json"
        if not path.parent.is_dir():
            raise ValueError(
                f"model.encoder_config_path: {path.parent} is no folder, so there is no {path}; "
                f"{IMPORT} (--from-hub NAME downloads)"
            )
        encoder = read_json(path, "model.encoder_config_path")
        prefix = f"model.encoder_config_path: {path}: "
    shape = check(EncoderShape, encoder, prefix=prefix)
    check_family(model.encoder_cls, shape, prefix.removesuffix(": ").removesuffix("."))
    num_blocks = count_blocks(model.feature_layer, shape)
    output_patch_size = model.output_patch_size or shape.patch_size
    image_size = model.image_size or shape.image_size // shape.patch_size * output_patch_size
    if image_size % output_patch_size:
        raise ValueError(
            f"model.image_size = {image_size} is not a multiple of {output_patch_size}, "
            f"model.output_patch_size; nearest: {nearest_multiples(image_size, output_patch_size)}"
        )
    mirrored = {
        "hidden_size": shape.hidden_size,
        "num_layers": num_blocks,
        "num_heads": shape.num_attention_heads,
        "intermediate_size": shape.intermediate_size,
        "norm_type": shape.norm_type,
        "use_qk_norm": shape.use_qk_norm,
        "layer_scale_init_value": shape.layer_scale_init_value,
    }
    given = model.decoder.model_dump(exclude_none=True)
    decoder = check(DecoderConfig, mirrored | given, prefix="model.decoder.")
    widths = {shape.hidden_size, model.embedding_dim, decoder.hidden_size}
    if not model.use_projections and len(widths) > 1:
        raise ValueError(
            f"model.use_projections = false needs one width throughout: the encoder has "
            f"{shape.hidden_size}, model.embedding_dim is {model.embedding_dim}, "
            f"model.decoder.hidden_size {decoder.hidden_size}"
        )
    return model.model_copy(
        update={
            "encoder_config": encoder,
            "encoder_config_path": None,
            "feature_layer": num_blocks,
            "image_size": image_size,
            "output_patch_size": output_patch_size,
            "decoder": decoder,
        }
    )
