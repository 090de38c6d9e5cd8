"""Real training of two ranks, killed in the middle of an epoch: all samples seen are the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.tiny import make_run, save_initial
from vqrae_ds.data.index import read_index
from vqrae_ds.data.loader import Batch
from vqrae_ds.data.order import SampleOrder
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.evaluation.summary import read_metrics

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY, BATCH = 24, 5, 4  # 39 samples: an epoch and three quarters of a batch more
KILLED_IN = 13


def settings(folder: Path, world_size: int) -> dict:
    return dict(
        losses={"perceptual": None, "adversarial": None},
        world_size=world_size,
        run={"output_dir": str(folder / "run"), "total_steps": STEPS, "seed": 3},
        data={
            "train": f"{folder.parent / 'shards'}{{_a,_b}}",
            "num_workers": 1,
            "bad_samples": "skip",
            "max_bad_share": 0.5,
        },
        checkpoint={"every_steps": SAVE_EVERY},
        monitor={"log_every_steps": 4, "validate_every_steps": 1000},
    )


def noting(
    batches: Iterator[Batch], seen: Path, first_step: int, micro_batches: int, killed_in: int
) -> Iterator[Batch]:
    """Note the keys of each batch; in the step `killed_in` the rank dies by SIGKILL."""
    for number, batch in enumerate(batches):
        step = first_step + number // micro_batches
        if step == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(seen, "a") as file:
            skipped = [message.partition("sample ")[2] for _, message in batch.skipped]
            file.write(json.dumps([step, batch.keys, skipped]) + "\n")
        yield batch


def train_noting(rank: int, folder: Path, world_size: int, killed_in: int) -> None:
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    scratch = folder / f"rank{rank}"
    scratch.mkdir(exist_ok=True)
    if not (scratch / "initial").exists():
        save_initial(scratch / "initial")
    run = make_run(scratch, 1, **settings(folder, world_size))
    setup = prepare(run)
    micro_batches = run.schedule.batch.accumulation
    first, start = setup.state.step + 1, f"start{setup.state.step:02d}"
    seen = folder / f"{start}_rank{rank}.jsonl"
    batches = noting(setup.batches, seen, first, micro_batches, killed_in)
    train(run, setup._replace(batches=batches))
    os._exit(0)  # it has ended the process group that `run_ranks` would end


def seen_by_step(folder: Path) -> dict[int, list]:
    """Keys, and what they stand in for, of each step, ranks side by side; later starts win."""
    steps: dict[int, dict[str, list]] = {}
    for path in sorted(folder.glob("start*.jsonl")):
        start = path.name.split("_")[0]
        for line in path.read_text().splitlines():
            step, *noted = json.loads(line)
            of_start = steps.setdefault(step, {}).setdefault(start, [[], []])
            for known, new in zip(of_start, noted, strict=True):
                known.extend(new)
    return {step: starts[max(starts)] for step, starts in sorted(steps.items())}


def test_a_killed_training_sees_the_samples_of_an_uninterrupted_one(tmp_path: Path) -> None:
    photos = find_images(ROOT / "tests/data/photos")
    for name, some, samples in (("a", photos[:25], 7), ("b", photos[25:37], 5)):
        source = tmp_path / f"photos_{name}"
        source.mkdir()
        for photo in some:
            (source / photo.name).write_bytes(photo.read_bytes())
        (source / "cut.webp").write_bytes(photos[0].read_bytes()[:3000])
        write_shards(
            find_images(source), tmp_path / f"shards_{name}", samples_per_shard=samples, root=source
        )
    straight, killed, fewer = (tmp_path / name for name in ("straight", "killed", "fewer"))
    for folder in (straight, killed):
        folder.mkdir()
    run_ranks(2, train_noting, straight, 2, 0)
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        run_ranks(2, train_noting, killed, 2, KILLED_IN)
    assert max(seen_by_step(killed)) == KILLED_IN - 1
    killed.rename(tmp_path / "kept")
    for folder in (killed, fewer):
        shutil.copytree(tmp_path / "kept", folder)
    run_ranks(2, train_noting, killed, 2, 0)
    assert (killed / "start10_rank0.jsonl").exists(), "it went on from the checkpoint of step 10"
    whole = seen_by_step(straight)
    assert list(whole) == list(range(1, STEPS + 1))
    assert seen_by_step(killed) == whole, "the ids of all samples, in the same steps"

    run_ranks(1, train_noting, fewer, 1, 0)  # another world: the same samples in each step
    of_one = seen_by_step(fewer)
    for step, (keys, skipped) in whole.items():
        assert Counter(of_one[step][0]) == Counter(keys)
        assert sorted(of_one[step][1]) == sorted(skipped)

    places = [place_of_all(tmp_path, position) for position in range(STEPS * BATCH)]
    epoch = [key for keys, skipped in whole.values() for key in keys][:39]
    left_out = [text for _, skipped in whole.values() for text in skipped]
    assert len(left_out) == sum(key == "cut" for key in places) >= 4
    missing = {key for key in places[:39] if key != "cut"} - set(epoch)
    assert not missing, "each sound sample comes in the first epoch"
    for folder in (straight, killed, fewer):
        assert read_metrics(folder / "run")[-1]["data/corrupt"] == len(left_out)

    shutil.rmtree(tmp_path / "shards_a")  # the same images once more, in other shards
    source = tmp_path / "photos_a"
    write_shards(find_images(source), tmp_path / "shards_a", samples_per_shard=6, root=source)
    run_ranks(1, refuse_other_shards, fewer)


def refuse_other_shards(rank: int, folder: Path) -> None:
    from vqrae_ds.preparation import prepare

    run = make_run(folder / f"rank{rank}", 1, **settings(folder, 1))
    with pytest.raises(ValueError, match="has the 39 samples of the set that the run went through"):
        prepare(run)


def place_of_all(tmp_path: Path, position: int) -> str:
    """The key at a position of the stream, from the indexes and the order alone."""
    indexes = [read_index(tmp_path / f"shards_{name}") for name in ("a", "b")]
    counts = [count for index in indexes for count in index.samples_per_shard]
    number = SampleOrder(counts, seed=3).sample_at(position).sample
    first = indexes[0].num_samples
    sample = indexes[0].sample(number) if number < first else indexes[1].sample(number - first)
    return sample.key


def stream_noting(rank: int, folder: Path, steps: int) -> None:
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    scratch = folder / f"rank{rank}"
    if not scratch.exists():
        scratch.mkdir()
        save_initial(scratch / "initial")
    sections = settings(folder, 2)
    sections["run"]["total_steps"] = 12
    sections["data"] |= {
        "train": f"{folder / 'shards'}/{{000000..000003}}.tar",
        "streaming": {"shuffle_samples": 6},
    }
    run = make_run(scratch, 1, **sections)
    setup = prepare(run)
    assert setup.state.step == 12 - steps
    seen = folder / f"start{setup.state.step:02d}_rank{rank}.jsonl"
    batches = noting(setup.batches, seen, setup.state.step + 1, 1, 6 if steps == 12 else 0)
    train(run, setup._replace(batches=batches))
    os._exit(0)  # as above


def test_a_training_on_streamed_shards_is_killed_and_goes_on(tmp_path: Path) -> None:
    photos = find_images(ROOT / "tests/data/photos")
    write_shards(photos, tmp_path / "shards", samples_per_shard=12, root=ROOT / "tests/data/photos")
    for path in (tmp_path / "shards").glob("index.*"):
        path.unlink()  # nothing but the tar files is needed
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        run_ranks(2, stream_noting, tmp_path, 12)
    run_ranks(2, stream_noting, tmp_path, 7)
    steps = seen_by_step(tmp_path)
    assert list(steps) == list(range(1, 13))
    assert all(len(keys) == BATCH and not skipped for keys, skipped in steps.values())
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12
