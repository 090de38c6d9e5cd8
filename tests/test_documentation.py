"""The pages for users name every key, variable and figure as the code has it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
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

FOLDERS = ("ds_configs", "launchers", "tools")
PAGES = [ROOT / "README.md", *(page for f in FOLDERS for page in (ROOT / f).rglob("*.md"))]
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
    assert lines, f"{page} has no table under {title}"
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[1:]]


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
            for name in re.findall(
                r"^(?:export )?\w+=\$\{([A-Z_]+):-", path.read_text(), re.MULTILINE
            ):
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


def run_of(stage: str, gpus: int, json: str, *overrides: str) -> Run:
    return read_run(
        ROOT / "ds_configs" / "internvit_6b" / f"stage{stage}.yaml",
        ROOT / "ds_configs" / f"{json}.json",
        overrides=overrides,
        world_size=gpus,
        check_paths=False,
    )


@pytest.mark.parametrize("row", rows(RECIPE, "Memory and time"), ids=" ".join)
def test_the_figures_of_the_recipe_are_the_planners(row: list[str]) -> None:
    from vqrae_ds.planning import GB, peak_bytes, plan, state_bytes

    stage, gpus, json, micro, encoder, accumulated, states, peak, rate, hours = row
    micro_batch = f"deepspeed.train_micro_batch_size_per_gpu={micro}"
    run = run_of(stage, int(gpus), json.strip("`"), micro_batch, f"memory.frozen_encoder={encoder}")
    planned = plan(run)
    assert run.schedule.batch.accumulation == int(accumulated)
    assert f"{sum(state_bytes(planned, int(gpus))) / GB:.1f}" == states
    assert f"{peak_bytes(planned, int(gpus)).total / GB:.1f}" == peak
    images_a_second = int(gpus) * MFU * PEAK_TFLOPS * 1e12 / flops_per_image(run)
    assert f"{images_a_second:,.0f}" == rate
    assert f"{run.config.data.samples_per_epoch / images_a_second / 3600:,.0f}" == hours


@pytest.mark.parametrize("row", rows(RECIPE, "Disk"), ids=" ".join)
def test_the_disk_of_the_recipe(row: list[str]) -> None:
    stage, size, at_once, frozen = row
    run = run_of(stage, 8, f"stage{stage}_zero3")
    assert f"{checkpoint_bytes(run) / 1e9:.1f} GB" == size
    assert f"{pretrained_bytes(run) / 1e9:.1f} GB" == frozen
    assert run.config.checkpoint.most_at_once(run.schedule.total_steps) == int(at_once)


LINKS = [
    (page.relative_to(ROOT), link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    if "://" not in link
]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=str)
def test_a_link_leads_to_a_file(page: Path, link: str) -> None:
    assert (ROOT / page.parent / link).exists()


COMMANDS = [
    (page.relative_to(ROOT), command)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for command in block.replace("\\\n", " ").split("\n")
    if "ds_configs/internvit_6b/" in command and ".json" in command
]
assert len(LINKS) > 5 and len(COMMANDS) > 5, "the patterns find them no more"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=str)
def test_the_overrides_of_a_command_are_keys(page: Path, command: str) -> None:
    """Each recipe in it resolves with the JSON behind it, on as many GPUs as it asks for."""
    words = shlex.split(command, comments=True)
    paths = [ROOT / word for word in words if word.startswith("ds_configs/")]
    overrides = [w for w in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+=.*", w)]
    nodes = re.search(r"--nodes=(\d+)", command)
    gpus = re.search(r"--(?:num_gpus|gpus) (\d+)", command)
    world_size = 8 * int(nodes[1]) if nodes else int(gpus[1]) if gpus else 8
    assert len(paths) % 2 == 0
    for config, json in zip(paths[::2], paths[1::2], strict=True):
        run = read_run(config, json, overrides=overrides, world_size=world_size, check_paths=False)
        assert run.schedule.batch.world_size == world_size


def test_a_message_that_is_explained_is_in_the_code() -> None:
    page = ROOT / "launchers" / "troubleshooting.md"
    sources = [path.read_text() for path in (ROOT / "vqrae_ds").rglob("*.py")]
    for message, *_ in rows(page, "What the trainer says"):
        assert any(message.strip("`") in source for source in sources), message


def test_every_tool_has_its_row() -> None:
    named = set(
        re.findall(r"^\| `(\w+\.py)`", (ROOT / "tools/README.md").read_text(), re.MULTILINE)
    )
    assert named == {path.name for path in (ROOT / "tools").glob("*.py")}
