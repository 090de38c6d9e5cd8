"""Checkpoints in one process: completeness, falling back from damage, retention, refusals.

Those of the frozen encoder are in test_checkpoint_frozen.py, what a resume restores is in
integration/test_resuming_engines.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.file_engine import FileEngine, run_alone, save_at, starting_from, with_changes
from tests.tiny import make_run
from tests.zero_files import seal
from vqrae_ds import checkpoint, manifest
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.checkpoint.names import local_root


@pytest.fixture
def run(tmp_path):
    with run_alone(tmp_path) as run:
        yield run


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_nothing_is_found_before_the_first_save(run):
    assert checkpoint.find(run) is None


def test_a_damaged_or_unfinished_checkpoint_falls_back_to_the_one_before(run, caplog):
    older, newer = save_at(run, 1), save_at(run, 2)
    state = newer / "generator" / "state"
    state.write_bytes(flipped(state.read_bytes()))
    assert checkpoint.find(run) == older
    assert "generator/state does not match its checksum" in caplog.text
    (older / "manifest.json").unlink()
    state.write_bytes(flipped(state.read_bytes()))
    assert checkpoint.find(run) == newer


@pytest.mark.parametrize("name", ["empty", "manifest.json"])
def test_a_file_that_the_disk_does_not_give_back_falls_back_too(run, caplog, name):
    older, newer = save_at(run, 1), save_at(run, 2)
    (newer / "empty").touch()
    seal(newer, step=2, world_size=1)
    assert checkpoint.find(run) == newer
    (newer / name).unlink()
    (newer / name).symlink_to("/proc/self/mem")  # a file of no bytes that answers EIO
    assert checkpoint.find(run) == older
    assert f"passing over {newer}: " in caplog.text and "Input/output error" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(run):
    older, newer = save_at(run, 1), save_at(run, 2)
    (older / "generator" / "state").unlink()
    payload = manifest.read_sealed(newer / "manifest.json")
    manifest.write_sealed(newer / "manifest.json", {**payload, "format_version": 99})
    with pytest.raises(ValueError) as refused:
        checkpoint.find(run)
    for part in (
        f"run.output_dir: {older.parent} holds no intact checkpoint",
        "step_00000001: generator/state is missing",
        "has format version 99, this code reads up to",
        "choose another folder to begin again",
    ):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    for folder in (older, newer):
        (folder / "manifest.json").unlink()
    assert checkpoint.find(run) is None, "without a manifest they do not exist"


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


def test_those_of_certain_steps_are_kept_for_ever(run):
    run = with_changes(run, "checkpoint", keep_every=3)
    folders = {step: save_at(run, step) for step in range(1, 9)}
    assert [step for step, folder in folders.items() if folder.exists()] == [3, 6, 7, 8]


def test_what_is_kept_for_ever_has_to_be_saved(tmp_path):
    with pytest.raises(
        ValueError, match="keep_every = 1500 is no multiple of .*every_steps = 1000"
    ):
        make_run(tmp_path, 1, checkpoint={"keep_every": 1500})


def test_what_killed_saves_left_goes_at_the_next_success(run):
    kept, partial, later = save_at(run, 1), *(checkpoint.step_folder(run, n) for n in (2, 9))
    for folder in (partial, later):
        (folder / "generator").mkdir(parents=True)
        (folder / "generator" / "state").write_text("half")
    newest = save_at(run, 3)
    assert [folder.exists() for folder in (kept, partial, newest, later)] == [1, 0, 1, 1]


def test_a_file_that_is_not_as_it_was_written_is_not_vouched_for(run):
    class Forgetful(FileEngine):
        def _copy_recovery_script(self, folder: str) -> None:
            super()._copy_recovery_script(folder)
            (Path(folder) / "generator" / "state").write_bytes(b"")

    older = save_at(run, 1)
    with pytest.raises(checkpoint.SaveFailed, match="generator/state has 0 bytes"):
        checkpoint.save(run, checkpoint.Content(Forgetful(), None, TrainState(2, 8)))
    assert list(older.parent.iterdir()) == [older]


def test_damaged_later_ones_never_displace_the_one_just_written(run):
    """They go once the run has gone on from the one before them."""
    run = with_changes(run, "checkpoint", keep_last=3)
    older, *later = [save_at(run, step) for step in (10, 30, 40)]
    for folder in later:
        (folder / "generator" / "state").write_text("damaged")
    assert checkpoint.find(run) == older
    again = save_at(run, 20)
    assert [folder.exists() for folder in (older, *later, again)] == [1, 0, 0, 1]
    assert checkpoint.find(run) == again


def test_a_run_goes_on_with_the_configuration_that_it_began_with(run):
    folder = save_at(run, 1)
    assert checkpoint.find(with_changes(run, "checkpoint", every_steps=7)) == folder
    with pytest.raises(ValueError, match="patch_size = 16 differs from 8 in .*run.json"):
        checkpoint.find(with_changes(run, "model", output_patch_size=16))
    with pytest.raises(ValueError, match="total_steps = 7 differs from 1000 in .*run.json"):
        checkpoint.find(with_changes(run, "run", total_steps=7))
    clipped = run._replace(deepspeed={**run.deepspeed, "gradient_clipping": 0.5})
    with pytest.raises(ValueError, match="gradient_clipping = 0.5 differs from 1.0 in .*run.json"):
        checkpoint.find(clipped)


def test_a_checkpoint_without_its_configuration_is_held_to_the_model(run):
    folder = save_at(run, 1)
    (folder / "run.json").unlink()
    seal(folder, step=1, world_size=1)
    assert checkpoint.find(with_changes(run, "model", legacy=False)) == folder
    with pytest.raises(ValueError, match="patch_size = 16 differs from 8 in .*model_config.json"):
        checkpoint.find(with_changes(run, "model", output_patch_size=16))


def test_one_rank_of_a_node_prepares_its_disk_for_all(run, tmp_path, monkeypatch):
    run = with_changes(run, "checkpoint", local_dir=str(tmp_path / "node"))
    left = local_root(run) / "rank_00000" / "half"
    monkeypatch.setenv("LOCAL_RANK", "1")
    checkpoint.prepare_local_dir(run)
    assert not (tmp_path / "node").exists(), "its neighbour may be emptying it"
    left.mkdir(parents=True)
    checkpoint.prepare_local_dir(run)
    assert left.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    checkpoint.prepare_local_dir(run)
    assert list((tmp_path / "node").iterdir()) == [local_root(run)] and not left.parent.exists()


def test_another_run_is_started_from_at_its_newest_intact_step(run, caplog):
    older, newer = save_at(run, 1), save_at(run, 2)
    home = older.parent.parent

    def start(folder: Path) -> str:
        return checkpoint.resolve_start(starting_from(run, folder)).config.init.from_run

    assert start(home) == start(home / "checkpoints") == start(newer) == str(newer)
    assert start(older) == str(older)
    state = newer / "generator" / "state"
    state.write_bytes(flipped(state.read_bytes()))
    assert start(home) == str(older)
    assert "generator/state does not match its checksum" in caplog.text
    with pytest.raises(ValueError, match="no intact checkpoint: generator/state does not match"):
        start(newer)
    shutil.rmtree(older)
    with pytest.raises(ValueError, match=f"{home} holds no intact checkpoint: generator/state"):
        start(home)
    (newer / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no manifest.json"):
        start(newer)
    with pytest.raises(ValueError, match=r"holds no complete checkpoint \(.*\)$"):
        start(home)
    (home / "model.safetensors").touch()
    with pytest.raises(ValueError, match="; it has weights that are converted already$"):
        start(home)
    assert checkpoint.resolve_start(run) == run, "it names no other run"


def test_checkpoints_of_another_run_are_refused(run):
    save_at(run, 1)
    other = run._replace(config=run.config.model_copy(update={"stage": 2}))
    with pytest.raises(ValueError, match="belongs to stage 1"):
        checkpoint.find(other)
