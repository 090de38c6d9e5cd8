"""How much memory a rank takes to load its share of a checkpoint: what it keeps, and no more."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed import run_ranks
from tests.memory import sampled_memory

pytestmark = pytest.mark.slow

WIDTH, LAYERS = 2048, 8
PARAMETERS = LAYERS * WIDTH * WIDTH  # 134 MB in fp32, and twice that of moments
SLACK = 24 << 20  # one matrix has 17 MB
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": WIDTH * WIDTH,
        "stage3_prefetch_bucket_size": 0,
    },
}


def build():
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=copy.deepcopy(CONFIG)
    )
    return engine


def save_one(rank: int, folder: Path) -> None:
    engine = build()
    engine.backward(engine(torch.ones(1, WIDTH)).square().mean())
    engine.step()
    engine.save_checkpoint(str(folder), tag="model", save_latest=False)


def load_share(rank: int, folder: Path) -> None:
    from vqrae_ds.sharding import loading

    engine, peaks = build(), {}
    with sampled_memory(peaks):
        loading.load(engine, loading.open_stored(folder / "model", engine))
    state = engine.optimizer.optimizer.state
    peaks["moments"] = sum(
        value.nbytes for kept in state.values() for value in kept.values() if value.ndim
    )
    (folder / f"peaks{rank}.json").write_text(json.dumps(peaks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_takes_the_memory_of_its_moments_alone(tmp_path: Path, ranks: int) -> None:
    """The masters are there before; the files of all ranks are mapped and may be dropped again."""
    run_ranks(1, save_one, tmp_path)
    run_ranks(ranks, load_share, tmp_path)
    for rank in range(ranks):
        peaks = json.loads((tmp_path / f"peaks{rank}.json").read_text())
        assert peaks["moments"] == 2 * 4 * PARAMETERS / ranks
        assert peaks["moments"] <= peaks["RssAnon"] + SLACK
        assert peaks["RssAnon"] < peaks["moments"] + SLACK
