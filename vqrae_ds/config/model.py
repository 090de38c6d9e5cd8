"""The configuration of the tokenizer itself; it travels with the weights as their `config.json`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vqrae_ds.config.checking import (
    Positive,
    PositiveNumber,
    Section,
    Text,
    Weight,
    check,
    show,
)
from vqrae_ds.config.files import read_json

NormType = Literal["layer_norm", "rms_norm"]


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

    encoder_cls: Literal["InternViT"] = "InternViT"
    encoder_config_path: Text | None = None
    encoder_config: dict[str, Any] | None = None
    image_size: Positive | None = None  # side of input and output in pixels; the encoder's own
    num_embeddings: Annotated[int, Field(ge=2)] = 16384
    embedding_dim: Positive = 1536
    commitment_cost: Weight = 0.25
    legacy: bool = True  # which side of the SimVQ loss the commitment cost scales (models/simvq.py)
    use_simvq: Literal[True] = True
    decoder: DecoderConfig = DecoderConfig()

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels, of encoder and decoder. Needs a resolved configuration."""
        assert self.encoder_config is not None, "resolve_model comes first"
        return EncoderShape.model_validate(self.encoder_config).patch_size

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


class EncoderShape(BaseModel):
    """What the decoder mirrors of the encoder's `config.json`; the rest is the encoder's own."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, protected_namespaces=())

    model_type: Literal["internvl_vision"] = "internvl_vision"
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
    def _square(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Hugging Face writes a side as a number or as [height, width]."""
        sides = {key: raw[key] for key in ("image_size", "patch_size") if key in raw}
        for key, side in sides.items():
            if isinstance(side, list | tuple):
                if len(side) != 2 or side[0] != side[1]:
                    raise ValueError(f"{key} = {show(side)} is not square: [side, side]")
                sides[key] = side[0]
        return {**raw, **sides}


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Read the encoder's `config.json` and fill in what the decoder mirrors.

    Raises `ValueError` where the file, a key of it or a divisibility is missing.
    """
    if model.encoder_config_path is None:
        encoder, prefix = copy.deepcopy(model.encoder_config), "model.encoder_config."
    else:
        path = Path(model.encoder_config_path) / "config.json"
        encoder = read_json(path, "model.encoder_config_path")
        prefix = f"model.encoder_config_path: {path}: "
    shape = check(EncoderShape, encoder, prefix=prefix)
    mirrored = {
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_hidden_layers,
        "num_heads": shape.num_attention_heads,
        "intermediate_size": shape.intermediate_size,
        "norm_type": shape.norm_type,
        "use_qk_norm": shape.use_qk_norm,
        "layer_scale_init_value": shape.layer_scale_init_value,
    }
    given = model.decoder.model_dump(exclude_none=True)
    image_size = model.image_size or shape.image_size
    if image_size % shape.patch_size:
        low = image_size // shape.patch_size * shape.patch_size
        sizes = [size for size in (low, low + shape.patch_size) if size > 0]
        raise ValueError(
            f"model.image_size = {image_size} is not a multiple of the encoder's patch size "
            f"{shape.patch_size}; nearest: {' and '.join(map(str, sizes))}"
        )
    return model.model_copy(
        update={
            "encoder_config": encoder,
            "encoder_config_path": None,
            "image_size": image_size,
            "decoder": check(DecoderConfig, mirrored | given, prefix="model.decoder."),
        }
    )
