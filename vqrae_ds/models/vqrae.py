"""VQRAE: encode -> quantise -> decode (arXiv:2511.23386, section 3.2).

    image -> encoder -> features_BND -> standardise, project -> z_BNE -> SimVQ -> z_q_BNE
          -> project -> decoder -> image

The features are continuous and never quantised: they serve understanding. The codes serve generation.

Shapes: B batch, N = h*w tokens, D encoder width, E codebook dimension.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.models.decoder import Decoder, unpatchify
from vqrae_ds.models.encoders import ENCODERS
from vqrae_ds.models.simvq import Search, SimVQ
from vqrae_ds.models.weights import SINGLE_FILE, WeightFolder, check_names
from vqrae_ds.ops.nearest_code import nearest_code


class VQRAEOutput(NamedTuple):
    """Everything the losses need. Patches are turned into pixels outside of an engine: see `reconstruction`."""

    patches_BhwP: Tensor  # output of the decoder's head
    hidden_BND: Tensor  # its input
    features_BND: Tensor  # continuous features of the encoder
    z_BNE: Tensor  # what is quantised
    code_BNE: Tensor  # the projected code of each token, before the straight-through step
    vq_loss: Tensor
    indices_Bhw: Tensor

    @property
    def reconstruction(self) -> Tensor:
        """The images (B, 3, H, W), clamped to [0, 1]."""
        return unpatchify(self.patches_BhwP).float().clamp(0, 1)


class Standardize(nn.Module):
    """Per-channel mean and scale of the frozen encoder's features, measured once by a calibration pass.

    InternViT ends without a norm. Uncentred features hit a handful of codes, and a LayerNorm does not help: it
    works along the channels and leaves an offset that all tokens share where it is.
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

    Weights are random; `from_pretrained` loads them. `encoder_config_path` is a folder with the
    encoder's config.json, `options` are the other fields of `ModelConfig`, and `config` stands for
    all of them. `freeze_encoder` runs the encoder without gradient. `attention` is the transformers
    library's name of the attention implementation, `search` finds the nearest codes.
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
        search: Search = nearest_code,
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
        self.config = config = resolve_model(config)
        self.freeze_encoder = freeze_encoder
        dim, patch_size = config.embedding_dim, config.patch_size
        self.encoder = ENCODERS[config.encoder_cls](config.encoder_config, attention)
        self.encoder.requires_grad_(not freeze_encoder)
        self.standardize = Standardize(self.encoder.hidden_size)
        self.in_proj = nn.Linear(self.encoder.hidden_size, dim)
        self.simvq = SimVQ(
            config.num_embeddings, dim, config.commitment_cost, config.legacy, search=search
        )
        self.out_proj = nn.Linear(dim, config.decoder.hidden_size)
        self.decoder = Decoder(config.decoder, config.image_size // patch_size, patch_size)

    def forward(self, images_B3HW: Tensor) -> VQRAEOutput:
        """Encode, quantise, decode."""
        h, w = (side // self.config.patch_size for side in images_B3HW.shape[-2:])
        features_BND = self.encode(images_B3HW)
        z_BNE = self.in_proj(self.standardize(features_BND))
        code_BNE, z_q_BNE, vq_loss, indices_BN = self.simvq.quantize(z_BNE)
        patches_BhwP, hidden_BND = self.decoder(self.out_proj(z_q_BNE), h, w)
        indices_Bhw = indices_BN.unflatten(1, (h, w))
        return VQRAEOutput(
            patches_BhwP, hidden_BND, features_BND, z_BNE, code_BNE, vq_loss, indices_Bhw
        )

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Continuous features (B, h*w, D), never quantised."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            return self.encoder(images_B3HW)

    def encode_to_indices(self, images_B3HW: Tensor) -> Tensor:
        """Codes (B, h, w) int64, each in [0, num_embeddings)."""
        h, w = (side // self.config.patch_size for side in images_B3HW.shape[-2:])
        z_BNE = self.in_proj(self.standardize(self.encode(images_B3HW)))
        return self.simvq.find_codes(z_BNE).unflatten(1, (h, w))

    def decode_from_indices(self, indices_Bhw: Tensor) -> Tensor:
        """Images (B, 3, H', W') in [0, 1]."""
        z_q_BNE = self.simvq.get_codebook_entry(indices_Bhw.flatten(1))
        patches_BhwP, _ = self.decoder(self.out_proj(z_q_BNE), *indices_Bhw.shape[1:])
        return unpatchify(patches_BhwP).float().clamp(0, 1)

    def get_codebook_usage(self) -> float:
        """Fraction of codes used since the last reset, 0..1."""
        return self.simvq.get_codebook_usage()

    def resets(self) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        """Each module that holds parameters of its own, with the call that draws them anew."""
        yield from self.encoder.resets()
        ours = (self.in_proj, self.simvq, self.out_proj, self.decoder)
        for module in (m for part in ours for m in part.modules()):
            if any(True for _ in module.parameters(recurse=False)):
                yield module, module.reset_parameters

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / SINGLE_FILE)
        (folder / "config.json").write_text(config_json(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, attention: str = "sdpa") -> VQRAE:
        """Load a consolidated folder: config.json and safetensors, every tensor checked by name and shape.

        The model is in evaluation mode, in the dtype of the stored parameters, its encoder not frozen.
        """
        config = read_config(folder)
        weights = WeightFolder(folder)
        model = cls(config=config, freeze_encoder=False, attention=attention)
        dtype = weights.read("out_proj.weight").dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        copy_weights(model, weights)
        return model.eval()


def read_config(folder: str | Path) -> ModelConfig:
    """The `config.json` of a consolidated folder. Raises `ValueError` where it is missing or of another kind."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: {folder} is not a folder of tools/convert_checkpoint.py"
        )
    return ModelConfig.model_validate_json(path.read_text())


def config_json(config: ModelConfig) -> str:
    """What `config.json` holds."""
    return json.dumps(config.model_dump(), indent=2) + "\n"


@torch.no_grad()
def copy_weights(model: nn.Module, weights: WeightFolder) -> None:
    """Copy every tensor of `weights` into `model`. Raises `ValueError` on a missing, extra or misshaped one."""
    targets = model.state_dict()
    check_names(set(targets), weights.names(), weights.folder)
    for name, target in targets.items():
        source = weights.read(name)
        if source.shape != target.shape:
            raise ValueError(
                f"{name} in {weights.folder} has shape {tuple(source.shape)}, the model {tuple(target.shape)}"
            )
        target.copy_(source)
