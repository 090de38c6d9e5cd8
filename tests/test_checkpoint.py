"""Checkpoints in one process: completeness, falling back from damage, retention, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.tiny import make_run, save_initial
from vqrae_ds import checkpoint
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run


class FileEngine:
    """Saves and loads one number in the way of a DeepSpeed engine."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "state").write_text(str(self.value))

    def load_checkpoint(self, folder: str, tag: str):
        path = Path(folder) / tag / "state"
        if not path.is_file():
            return None, None
        self.value = int(path.read_text())
        return str(path), {}


@pytest.fixture
def run(tmp_path):
    save_initial(tmp_path / "initial")
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield make_run(tmp_path, 1, checkpoint={"keep_last": 2}, world_size=1)
    dist.destroy_process_group()


def save_at(run: Run, step: int) -> Path:
    return checkpoint.save(run, FileEngine(step), FileEngine(-step), TrainState(step, 4 * step))


def test_nothing_is_found_before_the_first_save(run):
    assert checkpoint.find(run) is None


def test_resume_restores_both_engines_the_state_and_the_generator_of_random_numbers(run):
    folder = save_at(run, 7)
    expected = torch.rand(3)
    generator, discriminator = FileEngine(), FileEngine()
    assert checkpoint.find(run) == folder
    state = checkpoint.resume(folder, generator, discriminator)
    assert (state, generator.value, discriminator.value) == (TrainState(7, 28), 7, -7)
    assert torch.equal(torch.rand(3), expected)


def test_a_damaged_or_unfinished_checkpoint_falls_back_to_the_one_before(run, caplog):
    older, newer = save_at(run, 1), save_at(run, 2)
    (newer / "generator" / "state").write_text("9")
    assert checkpoint.find(run) == older
    assert "generator/state does not match its checksum" in caplog.text
    (older / "manifest.json").unlink()
    assert checkpoint.find(run) is None


def test_an_interrupted_save_is_written_over(run):
    leftover = checkpoint.step_folder(run, 3)
    leftover.mkdir(parents=True)
    (leftover / "generator").mkdir()
    (leftover / "junk").write_text("half")
    assert save_at(run, 3) == leftover
    assert not (leftover / "junk").exists()


def test_only_the_last_ones_are_kept(run):
    folders = [save_at(run, step) for step in (1, 2, 3, 4)]
    assert [folder.exists() for folder in folders] == [False, False, True, True]


def test_damaged_later_ones_never_displace_the_one_just_written(run):
    later = [save_at(run, step) for step in (30, 40)]
    for folder in later:
        (folder / "generator" / "state").write_text("damaged")
    assert checkpoint.find(run) is None
    again = [save_at(run, step) for step in (10, 20)]
    assert [folder.exists() for folder in later + again] == [False, False, True, True]
    assert checkpoint.find(run) == again[-1]


def with_model(run: Run, **changes) -> Run:
    model = run.config.model.model_copy(update=changes)
    return run._replace(config=run.config.model_copy(update={"model": model}))


def test_a_run_goes_on_with_the_model_that_it_began_with(run):
    folder = save_at(run, 1)
    assert checkpoint.find(with_model(run, legacy=False)) == folder, "of the loss, not the model"
    with pytest.raises(ValueError, match="patch_size = 16 differs from 8 in .*model_config.json"):
        checkpoint.find(with_model(run, output_patch_size=16))


def test_checkpoints_of_another_run_are_refused(run):
    folder = save_at(run, 1)
    other = run._replace(config=run.config.model_copy(update={"stage": 2}))
    with pytest.raises(ValueError, match="belongs to stage 1"):
        checkpoint.find(other)
    shutil.rmtree(folder / "discriminator")
    with pytest.raises(ValueError, match="holds no discriminator: losses.adversarial was off"):
        checkpoint.resume(folder, FileEngine(), FileEngine())
