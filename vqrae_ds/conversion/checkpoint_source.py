"""Which checkpoint is meant by a path, and whether anything vouches for it.

The trainer's own step folders have a manifest. A folder that DeepSpeed wrote by itself has none:
RUN/latest with the name of a folder beside it, or that folder. It can be read too, with a warning.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.config.checking import check
from vqrae_ds.config.files import read_json, read_recipe
from vqrae_ds.conversion.progress import progress_bar
from vqrae_ds.conversion.rank_checks import check_step_of_manifest, find_crc_damage
from vqrae_ds.conversion.rank_files import (
    AVERAGE_FILES,
    DISCRIMINATOR,
    GENERATOR,
    MODEL_CONFIG,
    load,
)
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.manifest import (
    MANIFEST_NAME,
    Manifest,
    find_damage,
    find_step_folder,
    read_manifest,
)

logger = logging.getLogger(__name__)

LATEST = "latest"  # DeepSpeed's file with the name of its newest folder
_OPTIMIZER_FILES = "*_optim_states.pt"
_COVERED = ("*/*_states.pt", "*/*.safetensors", AVERAGE_FILES)


class CheckpointSource(NamedTuple):
    """`folder` as `find_checkpoint` gives it; `manifest` is None where plain DeepSpeed wrote it.

    `generator` and `discriminator` hold the files of an engine's ranks, `model_config` is the text
    of a converted folder's `config.json`.
    """

    folder: Path
    generator: Path
    discriminator: Path | None
    manifest: Manifest | None
    model_config: str


def find_checkpoint(path: Path) -> Path:
    """The step folder, or the folder of plain DeepSpeed's files, that is meant by `path`.

    `path` is one of them, a run of the trainer or its checkpoints folder (the newest complete step
    is taken), or a folder with DeepSpeed's `latest`. Raises `ValueError` where it is none of these.
    """
    path = Path(path)
    if (path / LATEST).is_file():
        return _follow_latest(path)
    if any(path.glob(_OPTIMIZER_FILES)):
        return path.parent if (path.parent / MANIFEST_NAME).is_file() else path
    try:
        return find_step_folder(path)
    except ValueError as error:
        tags = sorted({file.parent.name for file in path.glob(f"*/{_OPTIMIZER_FILES}")})
        if not tags:
            raise
        raise ValueError(
            f"{path} has neither {MANIFEST_NAME} nor DeepSpeed's {LATEST!r}: name one of its "
            f"folders, {', '.join(tags)}"
        ) from error


def is_foreign(folder: Path) -> bool:
    """Whether plain DeepSpeed wrote the `folder` that `find_checkpoint` gave."""
    return not (folder / MANIFEST_NAME).is_file() and any(folder.glob(_OPTIMIZER_FILES))


def open_source(
    folder: Path, model_config: Path | None, *, progress: bool = False
) -> CheckpointSource:
    """The checkpoint in `folder`, as `find_checkpoint` gives it, after every check of its files.

    `model_config` is a file for `read_model_config`, needed where no manifest is. Raises
    `ValueError` for a checkpoint that is incomplete or damaged, listing its damaged files, and
    where the model's configuration is missing, or given although the checkpoint has its own.
    """
    if not is_foreign(folder):
        if model_config is not None:
            raise ValueError(f"--model-config {model_config}: {folder} has its own {MODEL_CONFIG}")
        manifest = read_manifest(folder)
        if damage := find_damage_of_checkpoint(folder, manifest, progress=progress):
            raise ValueError(f"{folder} is damaged: {'; '.join(damage)}")
        return describe_source(folder, None)
    source = describe_source(folder, model_config)
    logger.warning(
        "WARNING: %s has no manifest: its files have no checksums, and nothing vouches for them "
        "but the CRC-32 of each record, which is read now",
        folder,
    )
    if damage := find_crc_damage(sorted(folder.glob("*_states.pt")), progress=progress):
        raise ValueError("; ".join(damage))
    return source


def describe_source(folder: Path, model_config: Path | None) -> CheckpointSource:
    """As `open_source`, of a checkpoint that was checked before: no file is hashed."""
    if is_foreign(folder):
        if model_config is None:
            raise ValueError(
                f"{folder} has no {MODEL_CONFIG}, for plain DeepSpeed wrote it: give "
                "--model-config FILE, a YAML with the section `model` or a config.json"
            )
        # Imported here: the model's libraries take longer, and more memory, than a conversion.
        from vqrae_ds.models.vqrae import config_json

        text = config_json(read_model_config(model_config))
        return CheckpointSource(folder, folder, None, None, text)
    discriminator = folder / DISCRIMINATOR
    return CheckpointSource(
        folder,
        folder / GENERATOR,
        discriminator if discriminator.is_dir() else None,
        read_manifest(folder),
        (folder / MODEL_CONFIG).read_text(),
    )


def find_damage_of_checkpoint(
    folder: Path, manifest: Manifest, *, checksums: bool = True, progress: bool = False
) -> list[str]:
    """A line for each file of a step folder that is damaged, of another step, or not vouched for.

    Pickles that no conversion reads are looked into as well: one that is more than data is named.
    """
    total = manifest.num_bytes + (manifest.frozen.size if manifest.frozen else 0)
    with progress_bar(total, "checking", progress and checksums) as bar:
        damage = find_damage(folder, manifest, checksums=checksums, advance=bar.update)
    found = (path for pattern in _COVERED for path in folder.glob(pattern))
    covered = {MODEL_CONFIG, *(path.relative_to(folder).as_posix() for path in found)}
    damage += [f"{name} is not in the manifest" for name in sorted(covered - manifest.files.keys())]
    if damage:
        return damage
    try:
        for path in sorted(folder.glob("*.pt")):
            load(path)
        check_step_of_manifest(ZeroCheckpoint(folder / GENERATOR).files, manifest.step)
        if (folder / DISCRIMINATOR).is_dir():
            files = ZeroCheckpoint(folder / DISCRIMINATOR).files
            check_step_of_manifest(files, manifest.step, began_later=True)
    except ValueError as error:
        damage.append(str(error))
    return damage


def read_model_config(path: Path) -> ModelConfig:
    """The model of a `config.json`, or of the section `model` of a recipe in YAML.

    Raises `ValueError` for another file, and where it does not describe a model.
    """
    name = "--model-config"
    if path.suffix == ".json":
        raw = read_json(path, name)
    elif path.suffix in (".yaml", ".yml"):
        raw = read_recipe(path, name).values.get("model")
    else:
        raise ValueError(f"{name} {path} is neither .yaml nor .json")
    try:
        return resolve_model(check(ModelConfig, raw))
    except ValueError as error:
        raise ValueError(f"{name} {path} does not describe a model: {error}") from error


def _follow_latest(path: Path) -> Path:
    tag = (path / LATEST).read_text(errors="replace").strip()
    if not tag or Path(tag).name != tag:
        raise ValueError(f"{path / LATEST} names {tag!r}, which is no folder beside it")
    if not any((path / tag).glob(_OPTIMIZER_FILES)):
        raise ValueError(f"{path / LATEST} names {tag!r}, which holds no {_OPTIMIZER_FILES}")
    return path / tag
