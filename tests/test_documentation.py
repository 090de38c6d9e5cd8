"""The pages for users name every key, variable and figure as the code has it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pydantic import BaseModel

from tests.conftest import ROOT
from vqrae_ds import watchdog
from vqrae_ds.config import Run, TrainConfig, read_run
from vqrae_ds.config.deepspeed_json import OWNED_ELSEWHERE
from vqrae_ds.config.deepspeed_schema import DeepSpeedJson
from vqrae_ds.config.files import BASE
from vqrae_ds.launching.checkpoint_size import checkpoint_bytes, pretrained_bytes
from vqrae_ds.monitoring.flops import flops_per_image
from vqrae_ds.stopping import DONE, PREEMPTED, PREEMPTED_STATUS

PAGES = sorted(p for p in ROOT.rglob("*.md") if ".venv" not in p.parts and "runs" not in p.parts)
KEYS = ROOT / "ds_configs" / "README.md"
LAUNCHERS = ROOT / "launchers" / "README.md"
RECIPE = ROOT / "ds_configs" / "internvit_6b" / "README.md"
NEEDED, ENDINGS = "needed", "How a run ended"
PEAK_TFLOPS, MFU = 989, 0.40  # of the GPU that the recipes name


class Key(NamedTuple):
    """A key of a schema that has a row of its own."""

    name: str
    needed: bool
    default: Any


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """All keys but the sections that are always there."""
    for name, field in schema.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        default = field.default
        if isinstance(default, BaseModel):
            assert default == type(default)()
            default = {}
        may_be_null = type(None) in kinds
        if not sections or may_be_null:
            yield Key(prefix + name, field.is_required(), default)
        for section in sections:
            yield from keys_of(section, f"{prefix}{name}.")


def rows(page: Path, title: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    text = page.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_every_key_of_the_yaml_is_documented_with_its_default() -> None:
    table = {name.strip("`"): default for name, default, *_ in rows(KEYS, "Every key of the YAML")}
    keys = [Key(BASE, False, None), *keys_of(TrainConfig)]
    assert list(table) == [key.name for key in keys]
    for key in keys:
        shown = table[key.name]
        assert (shown == NEEDED) == key.needed, key.name
        if not key.needed:
            assert re.fullmatch("`[^`]+`", shown), key.name
            assert yaml.safe_load(shown.strip("`")) == key.default, key.name


def test_every_key_of_the_json_is_documented() -> None:
    table = {name.strip("`"): needed for name, needed, *_ in rows(KEYS, "The keys of the JSON")}
    keys = list(keys_of(DeepSpeedJson))
    assert set(table) == {key.name for key in keys}
    for key in keys:
        assert (table[key.name] == NEEDED) == key.needed, key.name
    refused = KEYS.read_text().partition("are refused here:")[2]
    assert set(re.findall("`([^`]+)`", refused)) == set(OWNED_ELSEWHERE)



def test_every_variable_of_a_launcher_is_documented() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "launchers").iterdir():
        if path.suffix in (".sh", ".sbatch", ""):
            for name in re.findall(r"^(?:export )?\w+=\$\{([A-Z_]+):-", path.read_text(), re.MULTILINE):
                found.setdefault(name, set()).add(path.name)
    table = {name.strip("`"): where for name, where, _ in rows(LAUNCHERS, "Variables")}
    assert table.keys() == found.keys()
    for name, scripts in found.items():
        patterns = re.findall("`([^`]+)`", table[name])
        files = [path for path in (ROOT / "launchers").iterdir() if path.suffix != ".md"]
        assert scripts == {f.name for f in files if any(map(f.match, patterns))}, name


def test_every_launcher_has_its_row() -> None:
    named = set(re.findall(r"^\| `([\w.]+)", LAUNCHERS.read_text(), re.MULTILINE))
    scripts = {path.name for path in (ROOT / "launchers").iterdir() if path.suffix != ".md"}
    assert scripts - named == {"site.sh", "Dockerfile.dockerignore"}


def test_the_endings_of_a_run_are_those_of_the_code() -> None:
    endings = {(name.strip("`"), int(status)) for name, status, _ in rows(LAUNCHERS, ENDINGS)}
    markers = {(DONE, 0), (PREEMPTED, PREEMPTED_STATUS)}
    assert endings == markers | {("none", status) for status in (1, 2, watchdog.EXIT_STATUS)}
