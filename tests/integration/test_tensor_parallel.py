"""dp x tp ranks against one process of plain PyTorch that sees the batches of all data groups.

Stage 1 with a GAN of adaptive weight and stage 2, under ZeRO-1, 2 and 3, tp 2 x dp 2 and
tp 4 x dp 1. The 63 codes divide by neither, the 98 hidden units not by 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.integration.test_exactness import (
    largest_difference,
    make_cell,
    relative_difference,
    train_with_engines,
)
from tests.plain_training import CLIP, STEPS, Cell, train_plainly
from tests.tiny import save_initial
from vqrae_ds.parallel.slices import merge, split_of

pytestmark = pytest.mark.slow

RANKS = 4
FIELDS = {"decoder": {"num_heads": 4, "intermediate_size": 98}, "num_embeddings": 63}
CELLS = [Cell(1, "adaptive", 1, "none", False), Cell(2, "fixed", 2, "full", False)]
SELECTIVE = Cell(2, "off", 1, "selective", False)  # in processes of its own: see test_exactness


class Layout(NamedTuple):
    """`tensor_size` ranks in a tensor group, the others of the four over the data."""

    tensor_size: int
    zero_stage: int

    @property
    def name(self) -> str:
        return f"tp{self.tensor_size}-dp{RANKS // self.tensor_size}-zero{self.zero_stage}"


LAYOUTS = [*(Layout(size, stage) for size in (2, 4) for stage in (1, 3)), Layout(2, 2)]


def train_all(
    rank: int, folder: Path, layouts: list[Layout], cells: list[Cell], lpips: Path
) -> None:
    for layout in layouts:
        for cell in cells:
            place = folder / layout.name
            shared = [None]
            if rank == 0:
                options = {"zero_stage": layout.zero_stage, "tensor_size": layout.tensor_size}
                shared = [make_cell(place, cell, RANKS, lpips, fields=FIELDS, **options)]
            torch.distributed.broadcast_object_list(shared, 0)
            train_with_engines(rank, shared[0], lpips, place / cell.name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lpips_weights):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for layout in LAYOUTS:
        save_initial(folder / layout.name / "initial", FIELDS)
    for size in (2, 4):
        layouts = [layout for layout in LAYOUTS if layout.tensor_size == size]
        run_ranks(RANKS, train_all, folder, layouts, CELLS, lpips_weights, timeout_seconds=400)
    run_ranks(RANKS, train_all, folder, [Layout(2, 3)], [SELECTIVE], lpips_weights)
    return folder


def merged(tensors: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors from those of the ranks of one tensor group; what is not cut is the same."""
    whole = {}
    for name, first in tensors[0].items():
        slices, split = [rank[name] for rank in tensors], split_of(name)
        if split is None:
            for other in slices[1:]:
                assert torch.equal(other, first), f"{name} differs within a group"
        whole[name] = first if split is None else merge(slices, split)
    return whole


CASES = [*((layout, cell) for layout in LAYOUTS for cell in CELLS), (Layout(2, 3), SELECTIVE)]


@pytest.mark.parametrize(
    ("layout", "cell"), CASES, ids=[f"{layout.name}-{cell.name}" for layout, cell in CASES]
)
def test_steps_equal_single_process(trained, lpips_weights, layout, cell):
    folder, size = trained / layout.name, layout.tensor_size
    plain = train_plainly(folder / "initial", cell, RANKS // size, lpips_weights, FIELDS)
    initial = load_file(folder / "initial" / "model.safetensors")
    files = [folder / cell.name / f"rank{rank}.pt" for rank in range(RANKS)]
    ranks = [torch.load(file, weights_only=True) for file in files]
    for rank, ours in enumerate(ranks):
        for mine, theirs in zip(ours["indices"], plain.indices[rank // size], strict=True):
            assert torch.equal(mine, theirs)
            assert len(theirs.unique()) > 1
        for mine, theirs in zip(ours["losses"], plain.losses[rank // size], strict=True):
            for name, expected in theirs.items():
                assert mine[name] == pytest.approx(expected, rel=1e-6), name
    for first in range(0, RANKS, size):
        group = ranks[first : first + size]
        for step in range(STEPS):
            gradients = merged([ours["gradients"][step] for ours in group])
            assert largest_difference(gradients, plain.gradients[step]) < 1e-5
        assert relative_difference(merged([r["weights"] for r in group]), plain.weights) < 1e-6
        frozen = merged([ours["frozen"] for ours in group])
        for name, value in frozen.items():
            source = name.replace("teacher.", "encoder.").removeprefix("vqrae.")
            assert torch.equal(value, initial[source]), f"{name} was frozen and has changed"
        for ours in group if cell.gan != "off" else ():
            assert relative_difference(ours["discriminator"], plain.discriminator) < 1e-6
    norms = []
    for step in range(STEPS):
        expected = sum(g.double().square().sum().item() for g in plain.gradients[step].values())
        measured = sum(sum(ours["norms"][step].values()) for ours in ranks)
        assert measured == pytest.approx(expected, rel=1e-4), "the shares make the whole norm"
        norms.append(expected**0.5)
    assert max(norms) > CLIP, "clipping must take part"
