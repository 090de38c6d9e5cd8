"""Small valid files of a run to change one thing in, and a dry run of them as a user starts it."""

from __future__ import annotations

import copy
import json
import resource
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.conftest import run_python

ENCODER = {
    "model_type": "internvl_vision",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 200,
    "image_size": [64, 64],
    "patch_size": [8, 8],
    "norm_type": "rms_norm",
    "use_qk_norm": True,
    "layer_scale_init_value": 0.2,
}
DEEPSPEED = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True},
    },
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 50}},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8},
}


class DryRun(NamedTuple):
    """How a dry run ended; `seconds` of processor time, which other work does not stretch."""

    status: int
    output: str
    errors: str
    seconds: float


def write_files(folder: Path, *changes: str) -> tuple[Path, Path]:
    """Write config.yaml, deepspeed.json (both paths are returned) and encoder/config.json.

    A change is `a.b=value` (YAML) or `-a.b`, which removes the key. Names that start with
    `deepspeed.` or `encoder.` are in those files.
    """
    for name in ("data", "encoder"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "data" / "index.json").touch()  # a dry run does not look into it
    settings = {
        "stage": 1,
        "run": {"output_dir": str(folder / "out"), "total_steps": 100},
        "model": {"encoder_config_path": str(folder / "encoder"), "num_embeddings": 512},
        "init": {"allow_untrained_encoder": True},
        "data": {"train": str(folder / "data")},
        "deepspeed": copy.deepcopy(DEEPSPEED),
        "encoder": copy.deepcopy(ENCODER),
    }
    for change in changes:
        _apply(settings, change)
    (folder / "encoder" / "config.json").write_text(json.dumps(settings.pop("encoder")))
    (folder / "deepspeed.json").write_text(json.dumps(settings.pop("deepspeed")))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml", folder / "deepspeed.json"


def dry_run(folder: Path, *arguments: str, python: tuple[str, ...] = ()) -> DryRun:
    """Dry run of the trainer with the files in `folder`; `python` are Python's own options."""
    files = ("--config", str(folder / "config.yaml"))
    files += ("--deepspeed_config", str(folder / "deepspeed.json"))
    start = _seconds_of_children()
    done = run_python(*python, "-m", "vqrae_ds.train", *files, "--dry-run", *arguments)
    return DryRun(done.returncode, done.stdout, done.stderr, _seconds_of_children() - start)


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def refusal(folder: Path, *arguments: str) -> str:
    """The line that a dry run is refused with, after asserting that it ends as it should."""
    status, output, errors, seconds = dry_run(folder, *arguments)
    assert (status, output) == (2, ""), errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert seconds < 2
    return errors.removeprefix("error: ").rstrip("\n")


def _apply(settings: dict[str, Any], change: str) -> None:
    name, _, value = change.removeprefix("-").partition("=")
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    if change.startswith("-"):
        del settings[key]
    else:
        settings[key] = yaml.safe_load(value)
