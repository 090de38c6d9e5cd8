"""Random damage to every file of a checkpoint and of a conversion: all of it is found and named.

A run falls back to the checkpoint before. `VQRAE_DAMAGE_DRILL=500` makes that many flips and cuts
in each folder instead of 100.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import make_run, save_initial
from tests.zero_files import seal, write_model_step, write_split_step
from vqrae_ds import checkpoint
from vqrae_ds.config.resuming import record
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.inspection import inspect
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.manifest import complete_steps, frozen_file, hash_file, read_manifest
from vqrae_ds.models.model_card import CARD

NUMBER = int(os.environ.get("VQRAE_DAMAGE_DRILL", "100"))


class Folders(NamedTuple):
    step: Path
    stage2: Path
    inference: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("folders")
    found = Folders(folder / "step_00001000", folder / "stage2", folder / "inference")
    write_model_step(found.step)
    consolidate(found.step, found.stage2, to="stage2", max_shard_bytes=100_000)
    consolidate(found.step, found.inference, to="inference")
    return found


def damaged_files(*folders: Path, seed: int) -> Iterator[Path]:
    """Files that are damaged until the next is asked for; every file has its turn.

    All but the card, which is text for people to edit, and which nothing reads.
    """
    draw = random.Random(seed)
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    files = [path for path in paths if path.name != CARD]
    for number in range(NUMBER):
        path = files[number % len(files)]
        intact = path.read_bytes()
        place = draw.randrange(len(intact))
        flipped = intact[place] ^ (1 << draw.randrange(8))
        cut = number // len(files) % 2
        path.write_bytes(intact[:place] + (b"" if cut else bytes([flipped]) + intact[place + 1 :]))
        yield path
        path.write_bytes(intact)


@pytest.mark.parametrize("kind", Folders._fields)
def test_every_flip_and_cut_is_found_and_named(folders, kind):
    folder = getattr(folders, kind)
    assert inspect(folder, verify=True).damage == []
    for path in damaged_files(folder, seed=1):
        damage = inspect(folder, verify=True).damage
        assert any(path.name in line for line in damage), f"{path}: {damage}"
    assert inspect(folder, verify=True).damage == [], "the drill put everything back"


def test_damage_to_the_frozen_weights_of_a_run_is_found_and_named(tmp_path):
    step = write_split_step(tmp_path / "run")
    assert inspect(step, verify=True).damage == []
    for path in damaged_files(tmp_path / "run" / "frozen", step, seed=4):
        damage = inspect(step, verify=True).damage
        assert any(path.name in line for line in damage), f"{path}: {damage}"
        with pytest.raises(ValueError, match=path.name):
            consolidate(step, tmp_path / "out", to="inference")


def test_a_run_falls_back_to_the_checkpoint_before_the_damaged_one(one_rank, tmp_path, caplog):
    """Frozen weights are those of all its checkpoints: there is none before to fall back to."""
    save_initial(tmp_path / "initial")
    run = make_run(tmp_path, 1, world_size=1)
    output = Path(run.config.run.output_dir)
    (output / "frozen").mkdir(parents=True)
    save_file({"vqrae.encoder.weight": torch.randn(5, 7)}, output / "frozen" / "new")
    frozen = hash_file(output / "frozen" / "new")
    (output / "frozen" / "new").rename(frozen_file(output, frozen))
    older, newer = (checkpoint.step_folder(run, step) for step in (10, 20))
    for step, folder in ((10, older), (20, newer)):
        write_model_step(folder, step=step)
        (folder / "run.json").write_text(json.dumps(record(run)))
        seal(folder, step=step, world_size=2, frozen=frozen)
    assert checkpoint.find(run) == newer
    for path in damaged_files(newer, output / "frozen", seed=5):
        caplog.clear()
        if path.parent.name == "frozen":
            with pytest.raises(ValueError, match=f"{path} .*all checkpoints of the run need it"):
                checkpoint.find(run)
            continue
        assert checkpoint.find(run) == older
        (line,) = caplog.messages
        assert line.startswith(f"passing over {newer}: ") and path.name in line
    assert checkpoint.find(run) == newer, "the drill put everything back"


def test_a_damaged_checkpoint_is_not_converted(folders, tmp_path):
    for path in damaged_files(folders.step, seed=2):
        with pytest.raises(ValueError, match=path.name):
            consolidate(folders.step, tmp_path / "out", to="inference")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_conversion_starts_no_stage_2(folders, one_rank, tmp_path):
    folder = tmp_path / "initial"
    shutil.copytree(folders.stage2, folder)
    run = make_run(tmp_path, 2, world_size=1)
    assert checkpoint.resolve_start(run) is run
    for path in damaged_files(folder, seed=3):
        with pytest.raises(ValueError, match=path.name):
            checkpoint.resolve_start(run)
    (folder / "conversion.json").unlink()
    assert checkpoint.resolve_start(run) is run, "a folder of other origin has no checksums"


def test_a_manifest_of_another_step_is_refused(folders, tmp_path, caplog):
    folder = tmp_path / "step_00000010"
    shutil.copytree(folders.step, folder)
    with pytest.raises(ValueError, match=r"is of step 1000, its folder is named step_00000010"):
        read_manifest(folder)
    assert complete_steps(tmp_path) == [] and "its folder is named" in caplog.text
    with pytest.raises(ValueError, match="its folder is named"):
        consolidate(folder, tmp_path / "out", to="inference")
    assert any("its folder is named" in line for line in inspect(folder).damage)


@pytest.mark.parametrize(
    "mixed",
    [
        "generator/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "generator/zero_pp_rank_1_mp_rank_00_model_states.pt",
        "generator/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "generator/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "generator",
        "discriminator/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ],
)
def test_files_of_another_step_are_found_although_the_manifest_vouches_for_them(
    folders, tmp_path, mixed
):
    """As after a copy that went wrong, sealed afterwards."""
    write_model_step(tmp_path / "step_00000010", step=10)
    folder = tmp_path / "step_00001000"
    shutil.copytree(folders.step, folder)
    if (folder / mixed).is_dir():
        shutil.rmtree(folder / mixed)
        shutil.copytree(tmp_path / "step_00000010" / mixed, folder / mixed)
    else:
        shutil.copy(tmp_path / "step_00000010" / mixed, folder / mixed)
    seal(folder, world_size=2)
    with pytest.raises(ValueError, match="of another step|of step 10, the manifest") as caught:
        consolidate(folder, tmp_path / "out", to="stage2")
    assert Path(mixed).name in str(caught.value)
    assert inspect(folder).damage
    if mixed != "generator":
        with pytest.raises(ValueError, match="is of another step than"):
            ZeroCheckpoint((folder / mixed).parent)


def test_one_rank_of_another_step_is_found_by_what_its_optimizer_counts(tmp_path):
    """With a single rank no other contradicts it: its two files do."""
    for step in (10, 20):
        write_model_step(tmp_path / f"step_{step:08d}", step=step, world_size=1)
    name = "generator/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    folder = tmp_path / "step_00000020"
    shutil.copy(tmp_path / "step_00000010" / name, folder / name)
    seal(folder, step=20, world_size=1)
    with pytest.raises(ValueError, match="has made 10 steps.*20: they are of different"):
        consolidate(folder, tmp_path / "out", to="inference")
