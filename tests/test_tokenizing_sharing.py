"""Ranks share the work without a word: each shard once, whoever comes, is slow or gone."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.tokenizing import (
    SIZES,
    contents,
    copy_to,
    crops_of_photos,
    damage_of,
    make_codes,
    run,
    task_of,
)
from vqrae_ds.tokenizing.folder import code_path
from vqrae_ds.tokenizing.job import begin_or_join
from vqrae_ds.tokenizing.sharing import Claims, Turn, turns
from vqrae_ds.worker import Worker


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model, shards and the codes of one straight run."""
    root = tmp_path_factory.mktemp("tokenizing")
    make_codes(root, crops_of_photos(sum(SIZES)))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return copy_to(tmp_path, made)


def test_turns_cover_all_shards_own_first():
    for world_size in (1, 2, 5, 9):
        for rank in range(world_size):
            order = list(turns(7, Worker(rank, world_size)))
            assert sorted(turn.shard for turn in order) == list(range(7))
            own = [turn.shard for turn in order if turn.is_own]
            assert own == list(range(rank, 7, world_size)) == [t.shard for t in order[: len(own)]]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_one_after_another_make_the_same(root, world_size):
    """Each first finds its own share, and helps then: one rank alone would do all."""
    expected = contents(root / "codes")
    shutil.rmtree(root / "codes")
    outcomes = [run(root, "codes", Worker(rank, world_size)) for rank in range(world_size)]
    assert [outcome.made.shards for outcome in outcomes] == [len(SIZES), *[0] * (world_size - 1)]
    assert contents(root / "codes") == expected


def test_a_file_that_another_rank_has_to_mend_is_left_to_it(root):
    """A rank that ended with an error would take its peers along."""
    before = contents(root / "codes")
    code_path(root / "codes", 1).write_bytes(b"damaged")
    code_path(root / "codes", 2).unlink()
    first = run(root, "codes", Worker(0, 2))
    assert (first.made.shards, first.totals) == (1, None)
    assert "manifest.json" not in contents(root / "codes")
    second = run(root, "codes", Worker(1, 2))
    assert (second.made.shards, second.totals.samples) == (1, sum(SIZES))
    assert contents(root / "codes") == before


def test_a_rank_may_come_while_another_begins(root, monkeypatch):
    """It has found no job; then a peer makes one and begins; then it looks at what is there."""
    shutil.rmtree(root / "codes")
    task = task_of(root)
    list_folder, claims = Path.iterdir, []

    def list_late(folder: Path) -> Iterator[Path]:
        monkeypatch.undo()
        begin_or_join(task.output, task.job)
        claims.append(Claims(task.output / "claims"))
        return list_folder(folder)

    monkeypatch.setattr(Path, "iterdir", list_late)
    begin_or_join(task.output, task.job)
    assert [name for name in contents(task.output) if not name.startswith(".")] == [
        "claims",
        "job.json",
    ]
    claims[0].close()
    (task.output / "job.json").unlink()
    with pytest.raises(ValueError, match="is not empty .claims."):
        begin_or_join(task.output, task.job)


def _hold(path: Path, shard: int, is_held, is_over) -> None:
    assert Claims(path).take(Turn(shard, is_own=True))
    is_held.set()
    is_over.wait(60)


def test_a_claim_lasts_as_long_as_its_process(root):
    shutil.rmtree(root / "codes")
    (root / "codes").mkdir()
    context = get_context("fork")
    is_held, is_over = context.Event(), context.Event()
    # The folder of a job must be there before anything else is in it.
    begin_or_join(root / "codes", task_of(root).job)
    path = root / "codes" / "claims"
    holder = context.Process(target=_hold, args=(path, 2, is_held, is_over))
    holder.start()
    try:
        assert is_held.wait(60)
        outcome = run(root)
        assert (outcome.made.shards, outcome.totals) == (len(SIZES) - 1, None)
        assert not code_path(root / "codes", 2).exists()
        assert not (root / "codes" / "manifest.json").exists()
    finally:
        holder.kill()
        holder.join()
    outcome = run(root)
    assert (outcome.made.shards, outcome.totals.samples) == (1, sum(SIZES))
    assert damage_of(root) == []


def test_without_locks_each_does_its_own_share(root, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    expected = contents(root / "codes")
    shutil.rmtree(root / "codes")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    outcomes = [run(root, "codes", Worker(rank, 2)) for rank in range(2)]
    assert [outcome.made.shards for outcome in outcomes] == [3, 2]
    assert outcomes[0].totals is None and outcomes[1].totals.samples == sum(SIZES)
    assert contents(root / "codes") == expected
