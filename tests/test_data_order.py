"""The order of samples by properties, over random shards, worlds, batch sizes and moments."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from vqrae_ds.data.order import Place, SampleOrder, micro_batch_positions

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)
SEEDS = st.integers(0, 2**32)
RANKS = st.integers(1, 8)
MICRO_BATCHES = st.integers(1, 5)


def consumed(
    order: SampleOrder, world_size: int, micro_batch: int, start: int, steps: int
) -> list[list[list[Place]]]:
    """What each rank takes in each step: places by step, then by rank."""
    settings_of_all = dict(micro_batch_size=micro_batch, world_size=world_size, start=start)
    ranks = [
        [
            [order.sample_at(position) for position in positions]
            for positions in itertools.islice(
                micro_batch_positions(rank=rank, **settings_of_all), steps
            )
        ]
        for rank in range(world_size)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


def flat(steps: list[list[list[Place]]]) -> list[Place]:
    return [place for step in steps for rank in step for place in rank]


@given(SHARDS, SEEDS, RANKS, MICRO_BATCHES)
def test_each_sample_comes_exactly_once_an_epoch(shards, seed, world_size, micro_batch):
    order, num_samples = SampleOrder(shards, seed=seed), sum(shards)
    steps = -(-3 * num_samples // (world_size * micro_batch))
    count = Counter(flat(consumed(order, world_size, micro_batch, 0, steps)))
    for epoch in range(3):
        assert [count[Place(epoch, i)] for i in range(num_samples)] == [1] * num_samples


@given(SHARDS, SEEDS, RANKS, MICRO_BATCHES, st.integers(0, 60), st.data())
def test_a_run_killed_anywhere_goes_on_with_the_same_samples(
    shards, seed, world_size, micro_batch, steps, data
):
    whole = consumed(SampleOrder(shards, seed=seed), world_size, micro_batch, 0, steps)
    killed_after = data.draw(st.integers(0, steps), label="killed after")
    start = killed_after * world_size * micro_batch
    later = consumed(
        SampleOrder(shards, seed=seed), world_size, micro_batch, start, steps - killed_after
    )
    assert whole[:killed_after] + later == whole


@given(SHARDS, SEEDS, st.lists(st.tuples(RANKS, MICRO_BATCHES, st.integers(0, 20)), max_size=5))
def test_worlds_that_change_lose_nothing_and_repeat_nothing(shards, seed, worlds):
    taken, start = [], 0
    for world_size, micro_batch, steps in worlds:
        taken += flat(
            consumed(SampleOrder(shards, seed=seed), world_size, micro_batch, start, steps)
        )
        start += world_size * micro_batch * steps
    order = SampleOrder(shards, seed=seed)
    assert taken == [order.sample_at(position) for position in range(start)]
    assert len(set(taken)) == len(taken)


@given(SHARDS, SEEDS, RANKS, MICRO_BATCHES, st.integers(0, 10**15), st.integers(1, 40))
def test_uneven_shards_give_all_ranks_equal_steps(
    shards, seed, world_size, micro_batch, start, steps
):
    taken = consumed(SampleOrder(shards, seed=seed), world_size, micro_batch, start, steps)
    assert len(taken) == steps
    assert all([len(rank) for rank in step] == [micro_batch] * world_size for step in taken)


@given(st.lists(st.integers(8, 12), min_size=6, max_size=9), SEEDS, SEEDS)
def test_other_seeds_and_epochs_give_other_orders(shards, seed, other_seed):
    def epochs(of: int) -> list[tuple[int, ...]]:
        order, num = SampleOrder(shards, seed=of), sum(shards)
        places = [order.sample_at(position).sample for position in range(2 * num)]
        return [tuple(places[:num]), tuple(places[num:])]

    found = epochs(seed) + (epochs(other_seed) if other_seed != seed else [])
    assert len(set(found)) == len(found)


@settings(max_examples=30)
@given(SHARDS, SEEDS, st.integers(0, 10**9))
def test_a_replacement_depends_on_seed_and_place_alone(shards, seed, position):
    order = SampleOrder(shards, seed=seed)
    place = order.sample_at(position)
    drawn = [order.replacement(place, attempt) for attempt in range(64)]
    order.sample_at(0)
    assert drawn == [SampleOrder(shards, seed=seed).replacement(place, a) for a in range(64)]
    assert all(0 <= number < sum(shards) for number in drawn)
    assert sum(shards) == 1 or len(set(drawn)) > 1
