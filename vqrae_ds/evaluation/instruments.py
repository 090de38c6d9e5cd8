"""Loads what an evaluation measures with, and says why something of it is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch

from vqrae_ds.config import ModelConfig, check_image_size
from vqrae_ds.config.files import read_json
from vqrae_ds.conversion.record import find_record
from vqrae_ds.evaluation.inception import Inception
from vqrae_ds.evaluation.measuring import Instruments
from vqrae_ds.evaluation.metrics import SSIM_WINDOW
from vqrae_ds.losses.perceptual import MIN_SIDE, PerceptualLoss, find_weights
from vqrae_ds.models.encoders import Encoder, build_encoder
from vqrae_ds.models.vqrae import VQRAE, read_config
from vqrae_ds.models.weights import DTYPES, WeightFolder, copy_weights, set_dtype

Dtype = Literal["fp32", "bf16"]


class Wanted(NamedTuple):
    """Where the weights lie; None is what nobody asked for."""

    model: Path
    original: Path | None  # an encoder's folder, or a model's
    lpips: Path | None  # None: torchvision's cache, if it is there
    inception: Path | None


class Opened(NamedTuple):
    """Instruments, and the reason for each figure that they cannot give."""

    instruments: Instruments
    left_out: dict[str, str]


def open_instruments(
    wanted: Wanted, *, dtype: Dtype | None, image_size: int | None, device: torch.device
) -> Opened:
    """All of them on `device`; `dtype` is that of the parameters, by default as they are stored.

    `image_size` is None for the size that the model was trained at. Raises `ValueError` for
    weights that are asked for and missing or wrong, and for a size that the model does not take.
    """
    left_out: dict[str, str] = {}
    if wanted.inception is None:
        left_out["rfid"] = "the canonical Inception weights are not given (--inception FILE)"
    if wanted.original is None:
        left_out["retention"] = "the original encoder is not given (--encoder FOLDER)"
    inception = None if wanted.inception is None else Inception(wanted.inception).to(device)
    model = load_model(wanted.model, dtype, device)
    side = image_size or model.config.image_size
    check_image_size(side, model.config.output_patch_size)
    if side < SSIM_WINDOW:
        left_out["ssim"] = f"its window has {SSIM_WINDOW} px, the images have {side}"
    original = None
    if wanted.original is not None:
        original = load_encoder(wanted.original, model.config)
        set_dtype(original, model.decoder.head.weight.dtype)
        original = original.to(device)
    perceptual = None
    if side < MIN_SIDE:
        left_out["lpips"] = f"it needs images of {MIN_SIDE} px or more, these have {side}"
    elif (reason := _missing_lpips(wanted.lpips)) is not None:
        left_out["lpips"] = reason
    else:
        perceptual = PerceptualLoss(wanted.lpips).to(device)
    return Opened(Instruments(model, original, perceptual, inception), left_out)


def load_model(folder: Path, dtype: Dtype | None, device: torch.device) -> VQRAE:
    """A consolidated folder on a device, in evaluation mode, its buffers in fp32 as always."""
    model = VQRAE.from_pretrained(folder)
    if dtype is not None:
        set_dtype(model, DTYPES[dtype])
    model = model.to(device).requires_grad_(False)
    model.quantizer.keep_codes()  # no weight changes any more: they are projected once
    return model


def load_encoder(folder: Path, config: ModelConfig) -> Encoder:
    """The encoder that a model of this `config` began with, on the CPU.

    `folder` is one of tools/import_encoder.py, or the model's own before its encoder was trained,
    as tools/convert_checkpoint.py --to stage2 writes it. Raises `ValueError` where the weights are
    missing or are those of another network, and where the folder is of a run of stage 2.
    """
    with torch.device("meta"):  # no value is drawn only to be overwritten
        encoder = build_encoder(config)
    encoder = encoder.to_empty(device="cpu")
    if "model_type" in read_json(folder / "config.json", "the encoder's folder"):
        copy_weights(encoder.model, WeightFolder(folder), encoder.leaves_out)
    else:
        _check_same_network(folder, config)
        _check_untrained(folder)
        whole = torch.nn.ModuleDict({"encoder": encoder})  # for the names that it has in a model
        copy_weights(whole, WeightFolder(folder), lambda name: not name.startswith("encoder."))
    return encoder.eval().requires_grad_(False)


def _check_same_network(folder: Path, config: ModelConfig) -> None:
    other = read_config(folder)
    for name in ("encoder_cls", "encoder_config", "feature_layer"):
        if getattr(other, name) != getattr(config, name):
            raise ValueError(f"--encoder {folder}: its {name} is not that of the model")


def _check_untrained(folder: Path) -> None:
    """A folder without a record is `VQRAE.save_pretrained`'s, and does not say."""
    record = find_record(folder)
    if record is not None and record.stage == 2:
        raise ValueError(
            f"--encoder {folder} is of stage 2, which trains the encoder: name the folder that its "
            "run began with, or the encoder's own of tools/import_encoder.py"
        )


def _missing_lpips(weights: Path | None) -> str | None:
    """Why LPIPS is left out, where nobody asked for it and its weights are not there."""
    if weights is not None:
        return None
    try:
        find_weights(None)
    except ValueError:
        return "its weights are neither given (--lpips FILE) nor in torchvision's cache"
    return None
