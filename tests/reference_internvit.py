"""InternViT in plain PyTorch, under its publisher's names, and folders as the publisher lays out.

Written from the description of the network, to hold the importer against. Shapes: B batch, N
tokens (class token first), D width, h x w grid of patches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

Config = dict[str, Any]

# The two kinds that are published: 6B, and 300M.
LARGE: Config = {
    "model_type": "intern_vit_6b",
    "architectures": ["InternVisionModel"],
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "image_size": 56,
    "patch_size": 14,
    "num_channels": 3,
    "qk_normalization": True,
    "qkv_bias": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "drop_path_rate": 0.1,
}
SMALL: Config = {**LARGE, "qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm"}
LAYOUTS = (
    "safetensors",
    "safetensors shards",
    "bin",
    "bin shards",
    "legacy bin",
    "legacy bin shards",
)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


class Embeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.grid = config["image_size"] // patch
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(config["num_channels"], width, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.empty(1, self.grid**2 + 1, width))

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        patches_BDhw = self.patch_embedding(pixels_B3HW)
        own_1D, table_ND = self.position_embedding[0].tensor_split([1])
        table_1Dhw = table_ND.T.reshape(1, -1, self.grid, self.grid)
        if patches_BDhw.shape[2:] != table_1Dhw.shape[2:]:
            size = patches_BDhw.shape[2:]
            table_1Dhw = F.interpolate(table_1Dhw, size, mode="bicubic", align_corners=False)
        first_B1D = (self.class_embedding + own_1D).expand(len(pixels_B3HW), -1, -1)
        rest_BND = (patches_BDhw + table_1Dhw).flatten(2).mT
        return torch.cat([first_B1D, rest_BND], dim=1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.num_heads = config["num_attention_heads"]
        self.qkv = nn.Linear(width, 3 * width, bias=config["qkv_bias"])
        self.proj = nn.Linear(width, width)
        normed = config["qk_normalization"]
        self.q_norm = RMSNorm(width, eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(width, eps) if normed else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)  # over the full width, before there are heads
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.fc2 = nn.Linear(config["intermediate_size"], config["hidden_size"])

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        norm = nn.LayerNorm if config.get("norm_type") == "layer_norm" else RMSNorm
        self.norm1, self.norm2 = norm(width, eps), norm(width, eps)
        self.attn, self.mlp = Attention(config), MLP(config)
        self.ls1, self.ls2 = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.ls1 * self.attn(self.norm1(x_BND))
        return x_BND + self.ls2 * self.mlp(self.norm2(x_BND))


class ReferenceInternViT(nn.Module):
    """The residual stream behind the last block, (B, 1 + h*w, D); there is no final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            Block(config) for _ in range(config["num_hidden_layers"])
        )

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        x_BND = self.embeddings(pixels_B3HW)
        for block in self.encoder.layers:
            x_BND = block(x_BND)
        return x_BND


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter such that each has its say in the output; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("ls1", "ls2", "lambda_1", "lambda_2", "lambda1")):
            parameter.copy_(0.1 + 0.9 * torch.rand(parameter.shape, generator=generator))
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.1 * noise)
    return model.eval()


def write_weights(folder: Path, tensors: dict[str, Tensor], layout: str, shards: int = 3) -> None:
    """Write `tensors` in one of `LAYOUTS`; neighbours go to different shards."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("pytorch_model", "bin") if "bin" in layout else ("model", "safetensors")

    def save(part: dict[str, Tensor], path: Path) -> None:
        if suffix == "safetensors":
            save_file(
                {
                    name: tensor.clone(memory_format=torch.contiguous_format)
                    for name, tensor in part.items()
                },
                path,
            )
        else:
            torch.save(part, path, _use_new_zipfile_serialization=not layout.startswith("legacy"))

    if "shards" not in layout:
        save(tensors, folder / f"{stem}.{suffix}")
        return
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_source(
    folder: Path, config: Config, tensors: dict[str, Tensor], layout: str = "safetensors"
) -> Path:
    """A checkpoint folder: `config.json` and weights."""
    write_weights(folder, tensors, layout)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_chat(folder: Path, config: Config, tensors: dict[str, Tensor], layout: str) -> Path:
    """The publisher's chat checkpoint that has the encoder inside."""
    inside = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    beside = {
        "language_model.model.embed_tokens.weight": torch.randn(10, 8),
        "mlp1.0.weight": torch.randn(256),
    }
    whole = {"model_type": "internvl_chat", "select_layer": -1, "vision_config": config}
    return write_source(folder, whole, inside | beside, layout)
