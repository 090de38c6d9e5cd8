"""VQRAE: encode -> quantise -> decode (arXiv:2511.23386, section 3.2).

    image -> encoder -> features_BND -> standardise, project -> z_BNE -> SimVQ -> z_q_BNE
          -> project -> decoder -> image

The features are continuous and never quantised: they serve understanding. The codes serve
generation.

A token is q x q pixels of an image, on the way in and on the way out. The encoder reads p x p
pixels a token; where q differs from p, it sees the image resized.

Shapes: B batch, H x W pixels, h x w grid of patches, N = h*w tokens, D encoder width, E codebook
dimension, P values a patch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.config.checking import check
from vqrae_ds.config.files import read_json
from vqrae_ds.models.activation_checkpointing import Checkpointing
from vqrae_ds.models.decoder import WHOLE, Decoder, Layers, unpatchify
from vqrae_ds.models.ema_codebook import EMACodebook
from vqrae_ds.models.encoders import build_encoder, check_images, check_range
from vqrae_ds.models.finite import check_finite
from vqrae_ds.models.model_card import write_model_card
from vqrae_ds.models.quantizer import Quantizer
from vqrae_ds.models.simvq import Codebook, FrozenCodebook, SimVQ
from vqrae_ds.models.weights import SINGLE_FILE, WeightFolder, copy_weights, set_dtype, weight_files
from vqrae_ds.ops.code_search import search_where_they_are
from vqrae_ds.ops.nearest_code import Search


class VQRAEOutput(NamedTuple):
    """Everything the losses need."""

    patches_BhwP: Tensor  # output of the decoder's head
    hidden_BND: Tensor  # its input
    features_BND: Tensor  # continuous features of the encoder
    z_BNE: Tensor  # what is quantised
    code_BNE: Tensor  # the projected code of each token, before the straight-through step
    vq_loss: Tensor
    indices_Bhw: Tensor

    @property
    def reconstruction(self) -> Tensor:
        """The images (B, 3, H, W) in [0, 1], fp32."""
        return to_images(self.patches_BhwP)


class Standardize(nn.Module):
    """Per-channel mean and scale of the frozen encoder's features, measured by a calibration pass.

    InternViT ends without a norm. With an offset that all tokens share, training begins with a
    handful of codes and gets out of it late or not at all (tests/test_standardization.py). A
    LayerNorm does not help: it works along the channels and leaves the offset where it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, features_BND: Tensor) -> Tensor:
        return ((features_BND.float() - self.mean) / self.std).to(features_BND.dtype)


class VQRAE(nn.Module):
    """The tokenizer. Images go in and come out as (B, 3, H, W) in [0, 1].

    Both sides are multiples of q, `output_patch_size`, and an image comes out as large as it went
    in. Where q differs from p, the encoder's patch size, the encoder sees it resized by p / q.

    `encoder_config_path` is a folder with the encoder's `config.json`. Safetensors beside it are
    loaded into the encoder; all else is random: `from_pretrained` loads a whole model. `options`
    are the other fields of `ModelConfig`, and `config` stands for all of them. `freeze_encoder`
    runs the encoder without gradient. `attention` is the transformers library's name of the
    encoder's attention implementation. `search` finds the nearest codes; left to itself it is the
    one for the device (`ops.code_search`). Of `codebook` and `layers` quantiser and decoder are
    made. In training mode the blocks keep for the backward pass what the checkpointings say; a
    frozen encoder has none.

    Raises `ValueError` for a field that is unknown or does not fit, and for weights that do not.
    """

    def __init__(
        self,
        encoder_cls: str = "InternViT",
        encoder_config_path: str | Path | None = None,
        num_embeddings: int = 16384,
        use_simvq: bool = True,
        freeze_encoder: bool = True,
        *,
        config: ModelConfig | None = None,
        attention: str = "sdpa",
        search: Search = search_where_they_are,
        codebook: Codebook = FrozenCodebook,
        layers: Layers = WHOLE,
        encoder_checkpointing: Checkpointing = "none",
        decoder_checkpointing: Checkpointing = "none",
        **options: Any,
    ) -> None:
        super().__init__()
        if config is None:
            path = None if encoder_config_path is None else str(encoder_config_path)
            config = ModelConfig(
                encoder_cls=encoder_cls,
                encoder_config_path=path,
                num_embeddings=num_embeddings,
                use_simvq=use_simvq,
                **options,
            )
        elif options:
            raise ValueError(f"config is given: set {', '.join(options)} in it")
        encoder_folder = config.encoder_config_path
        self.config = config = resolve_model(config)
        self.freeze_encoder = freeze_encoder
        self.encoder = build_encoder(config, attention)
        if encoder_folder is not None and weight_files(encoder_folder):
            copy_weights(self.encoder.model, WeightFolder(encoder_folder), self.encoder.leaves_out)
        self.encoder.requires_grad_(not freeze_encoder)
        if not freeze_encoder:
            self.encoder.set_checkpointing(encoder_checkpointing)
        width, dim = self.encoder.hidden_size, config.embedding_dim
        decoder_width = config.decoder.hidden_size
        self.standardize = _standardization(config.standardization, width)
        self.in_proj = nn.Linear(width, dim) if config.use_projections else nn.Identity()
        self.quantizer = _quantizer(config, search, codebook)
        self.out_proj = nn.Linear(dim, decoder_width) if config.use_projections else nn.Identity()
        patches = config.grid_side, config.output_patch_size
        self.decoder = Decoder(config.decoder, *patches, decoder_checkpointing, layers)

    def forward(self, images_B3HW: Tensor) -> VQRAEOutput:
        """Encode, quantise, decode. Raises `ValueError` as `encode` does."""
        features_BND = self.encode(images_B3HW)
        z_BNE = self.in_proj(self.standardize(features_BND))
        code_BNE, z_q_BNE, vq_loss, indices_BN = self.quantizer.quantize(z_BNE)
        h, w = self._grid(images_B3HW)
        patches_BhwP, hidden_BND = self.decoder(self.out_proj(z_q_BNE), h, w)
        indices_Bhw = indices_BN.unflatten(1, (h, w))
        return VQRAEOutput(
            patches_BhwP, hidden_BND, features_BND, z_BNE, code_BNE, vq_loss, indices_Bhw
        )

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Continuous features (B, h*w, D), never quantised, of floats in [0, 1].

        Raises `ValueError` where a side is no multiple of q, or for another shape; in evaluation
        mode also for values far from [0, 1], 0..255 for example.
        """
        if not self.training:  # the check waits for the device, which no training step does
            check_range(images_B3HW)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            return self.encoder(self.resize_for_encoder(images_B3HW))

    @torch.no_grad()
    def encode_to_indices(self, images_B3HW: Tensor) -> Tensor:
        """Codes (B, h, w) int64, each in [0, num_embeddings).

        Raises `ValueError` as `encode` does, and where the features are not finite.
        """
        z_BNE = self.in_proj(self.standardize(self.encode(images_B3HW)))
        self.quantizer.check_finite(z_BNE)
        return self.quantizer.find_codes(z_BNE).unflatten(1, self._grid(images_B3HW))

    def decode_from_indices(self, indices_Bhw: Tensor) -> Tensor:
        """Codes (B, h, w) of any grid -> images (B, 3, h*q, w*q) in [0, 1], fp32.

        Raises `ValueError` for another shape, for an index outside [0, num_embeddings), and where
        the decoder's output is not finite.
        """
        if indices_Bhw.ndim != 3:
            way_out = "codes in a row get their grid by indices.view(-1, h, w)"
            shape = tuple(indices_Bhw.shape)
            raise ValueError(f"indices have shape {shape}, not (B, h, w): {way_out}")
        z_q_BNE = self.quantizer.get_codebook_entry(indices_Bhw.flatten(1))
        z_q_BNE = z_q_BNE.to(self.decoder.head.weight.dtype)  # moving averages are fp32 always
        patches_BhwP, _ = self.decoder(self.out_proj(z_q_BNE), *indices_Bhw.shape[1:])
        check_finite(patches_BhwP, "the decoder's output")
        return to_images(patches_BhwP)

    def resize_for_encoder(self, images_B3HW: Tensor) -> Tensor:
        """Images, q pixels a token, as the encoder sees them, p pixels a token.

        Bicubic with antialiasing, clamped to [0, 1], fp32. Where q = p they stay as they are.
        Raises `ValueError` where a side is no multiple of q.
        """
        p, q = self.config.patch_size, self.config.output_patch_size
        if p == q:
            return images_B3HW
        check_images(images_B3HW, q)
        size = [side // q * p for side in images_B3HW.shape[2:]]
        return F.interpolate(images_B3HW.float(), size, mode="bicubic", antialias=True).clamp(0, 1)

    def get_codebook_usage(self) -> float:
        """Fraction of codes used since the last reset, 0..1."""
        return self.quantizer.get_codebook_usage()

    def resets(self) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        """Each module with parameters of its own, and the call that draws them anew."""
        yield from self.encoder.resets()
        yield from self.quantizer.resets()
        ours = (self.in_proj, self.out_proj, self.decoder)
        for module in (m for part in ours for m in part.modules()):
            if any(True for _ in module.parameters(recurse=False)):
                yield module, module.reset_parameters

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and a card; `from_pretrained` reads the two."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / SINGLE_FILE)
        (folder / "config.json").write_text(config_json(self.config))
        write_model_card(folder, self.config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, attention: str = "sdpa") -> VQRAE:
        """Load a consolidated folder: `config.json`, and safetensors in one file or in shards.

        The model is on the CPU, in evaluation mode, its encoder not frozen. Parameters have the
        dtype in which the trained ones are stored; buffers are fp32.

        Raises `ValueError` for a file that is missing or damaged, and for tensors that are missing,
        foreign or of another shape; the message names them.
        """
        config, weights = read_config(folder), WeightFolder(folder)
        with torch.device("meta"):  # no value is drawn only to be overwritten
            model = cls(config=config, freeze_encoder=False, attention=attention)
        # That of the decoder: a frozen encoder may be stored in less.
        set_dtype(model, weights.read("decoder.head.weight").dtype)
        model.to_empty(device="cpu")
        copy_weights(model, weights)
        model.quantizer.reset_unsaved_buffers()
        return model.eval()

    def _grid(self, images_B3HW: Tensor) -> tuple[int, int]:
        H, W = images_B3HW.shape[2:]
        return H // self.config.output_patch_size, W // self.config.output_patch_size


def _standardization(kind: str, width: int) -> nn.Module:
    if kind == "calibrated":
        return Standardize(width)
    return nn.Identity() if kind == "none" else nn.LayerNorm(width, elementwise_affine=False)


def _quantizer(config: ModelConfig, search: Search, codebook: Codebook) -> Quantizer:
    size = (config.num_embeddings, config.embedding_dim, config.commitment_cost)
    if not config.use_simvq:
        return EMACodebook(*size, config.ema_decay, search=search)
    return SimVQ(
        *size,
        config.legacy,
        bias=config.codebook_projection_bias,
        projection_init=config.codebook_projection_init,
        search=search,
        codebook=codebook,
    )


def to_images(patches_BhwP: Tensor) -> Tensor:
    """Patches of the decoder -> images (B, 3, H, W), fp32, clamped to [0, 1]."""
    return unpatchify(patches_BhwP).float().clamp(0, 1)


def read_config(folder: str | Path) -> ModelConfig:
    """The `config.json` of a consolidated folder.

    Raises `ValueError` where it is missing or does not describe a model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: {folder} is not a folder of tools/convert_checkpoint.py"
        )
    raw = read_json(path, "the model's folder")
    if "model_type" in raw:
        raise ValueError(f"{folder} holds an encoder alone (tools/import_encoder.py), no tokenizer")
    try:
        return resolve_model(check(ModelConfig, raw))
    except ValueError as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


def config_json(config: ModelConfig) -> str:
    """What `config.json` holds."""
    return json.dumps(config.model_dump(), indent=2) + "\n"
