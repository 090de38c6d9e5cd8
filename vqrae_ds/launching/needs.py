"""What a run needs of every node, from its configuration: folders, files, packages, disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqrae_ds.config import Run
from vqrae_ds.config.data_paths import data_folders
from vqrae_ds.config.files import read_recipe
from vqrae_ds.launching.checkpoint_size import checkpoint_bytes, pretrained_bytes
from vqrae_ds.launching.orders import forwarded

PACKAGE = "vqrae_ds"
REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
# Names in torchvision's cache: `losses.perceptual` and `losses.convnext` look for them there.
_CACHED = {"perceptual": "vgg16-397923af.pth", "convnext": "convnext_small-0c510722.pth"}


class Needs(NamedTuple):
    """All paths are absolute, as the ranks will see them from the folder of the launcher."""

    folder: str  # that the run is started in
    search: list[str]  # where Python looks for packages before the installed ones
    environment: dict[str, str]  # that the ranks get
    packages: list[str]  # whose versions are to be the same on all nodes
    config: list[str]  # files that every rank reads
    run_folder: str
    data: dict[str, str]  # setting: folder with an index
    weights: list[dict[str, Any]]  # setting, path or name in the cache, kind, is_first
    checkpoint_bytes: int  # of one
    most_checkpoints: int  # that there must be room for
    pretrained_bytes: int  # written once a run
    local_dir: str | None  # that each node has for itself, with room for its share of a checkpoint
    port: int
    uses_gpus: bool

    def details(self, number: int, nodes: int, token: str) -> dict[str, Any]:
        """What the probe on node `number` of `nodes` is asked about."""
        return {
            "folder": self.folder,
            "search": self.search,
            "environment": self.environment,
            "package": PACKAGE,
            "packages": self.packages,
            "config": self.config,
            "run_folder": self.run_folder,
            "token": token,
            "local_dir": self.local_dir,
            "data": self.data,
            "share": {"rank": number, "nodes": nodes},
            "weights": self.weights,
            "devices": self.uses_gpus,
            "port": self.port if number == 0 else None,
        }


def needs_of(run: Run, config: Path, deepspeed: Path, overrides: Sequence[str], port: int) -> Needs:
    """The needs of a run that is started from this folder with this environment."""
    recipe = read_recipe(config, "--config")
    files = [config, deepspeed, *([recipe.base_path] if recipe.base_path else [])]
    encoder = (recipe.values.get("model") or {}).get("encoder_config_path")
    for override in overrides:
        name, _, value = override.partition("=")
        encoder = value if name == "model.encoder_config_path" else encoder
    if isinstance(encoder, str):
        files.append(Path(encoder, "config.json"))
    search = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    checkpoint = run.config.checkpoint
    return Needs(
        folder=os.getcwd(),
        search=list(dict.fromkeys(map(_absolute, search))),
        environment=forwarded(os.environ, os.environ.get("VQRAE_FORWARD", "")),
        packages=[*required_packages(), PACKAGE],
        config=[_absolute(path) for path in files],
        run_folder=_absolute(run.config.run.output_dir),
        data={setting: _absolute(path) for setting, path in data_folders(run.config.data).items()},
        weights=_weights(run),
        checkpoint_bytes=checkpoint_bytes(run),
        most_checkpoints=checkpoint.most_at_once(run.schedule.total_steps),
        pretrained_bytes=pretrained_bytes(run),
        local_dir=None if checkpoint.local_dir is None else _absolute(checkpoint.local_dir),
        port=port,
        uses_gpus=os.environ.get("DS_ACCELERATOR") != "cpu",
    )


def required_packages() -> list[str]:
    """The names in the project's requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [re.match(r"[\w.-]+", line)[0] for line in lines if line]


def _weights(run: Run) -> list[dict[str, Any]]:
    found, init, losses = [], run.config.init, run.config.losses
    first = (
        ("init.encoder_weights", init.encoder_weights, "weights"),
        ("init.model", init.model, "weights"),
        ("init.from_run", init.from_run, "folder"),
    )
    for setting, path, kind in first:
        if path is not None:
            entry = {"setting": setting, "path": _absolute(path), "kind": kind, "is_first": True}
            found.append(entry)
    for name, term in (("perceptual", losses.perceptual), ("convnext", losses.convnext)):
        if term is not None:
            path = None if term.weights is None else _absolute(term.weights)
            entry = {"setting": f"losses.{name}.weights", "path": path, "cached": _CACHED[name]}
            found.append({**entry, "kind": "file", "is_first": False})
    return found


def _absolute(path: str | Path) -> str:
    # Not resolved: a link may lead elsewhere on another node.
    return os.path.abspath(path)
