"""The bytes of model states against what DeepSpeed really keeps, in each stage and precision."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.held_tensors import settled_bytes, storages, tensors
from tests.test_planner import run_of
from vqrae_ds.planning import Part, Plan, state_bytes

ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
MIXED = {"bf16": {"enabled": True}}
SUMMED_IN_FP32 = {**MIXED, "data_types": {"grad_accum_dtype": "fp32"}}
LOW = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
LOW["bf16"]["bf16_optimizer_states"] = True
PRECISIONS = {"fp32": {}, "bf16": MIXED, "bf16_summed_in_fp32": SUMMED_IN_FP32, "bf16_states": LOW}
SIDE, LAYERS, RANKS = 512, 4, 2
SMALL_BUFFERS = {"reduce_bucket_size": 1e4, "allgather_bucket_size": 1e4}
NOTHING_KEPT = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}


def measure(rank: int, folder: Path) -> None:
    """Bytes a trained element that a rank holds between two micro batches; as many are frozen."""
    import deepspeed

    measured, engines, earlier = {}, [], []
    cases = list(itertools.product((1, 2, 3), PRECISIONS))
    for stage, name in [cases[0], *cases]:  # the first engine makes what all of a process share
        earlier += tensors()  # kept alive, so that no address is used twice
        before = storages(earlier)
        config = {
            "train_batch_size": 4 * RANKS,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "optimizer": ADAMW,
            "zero_optimization": {"stage": stage, **SMALL_BUFFERS},
            **PRECISIONS[name],
        }
        init = contextlib.nullcontext()
        if stage == 3:
            config["zero_optimization"] |= NOTHING_KEPT
            init = deepspeed.zero.Init(config_dict_or_path=config)
        with init:
            layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(2 * LAYERS)]
            model = nn.Sequential(*layers)
        model[LAYERS:].requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        x_BD = torch.randn(1, SIDE, dtype=torch.float32 if name == "fp32" else torch.bfloat16)
        for _ in range(6):  # a step of 4, then 2 that are summed up
            engine.backward(engine(x_BD).float().square().mean())
            engine.step()
        measured[f"{name}_zero{stage}"] = settled_bytes(before) / (LAYERS * SIDE * SIDE)
        engines.append(engine)
    (folder / f"measured{rank}.json").write_text(json.dumps(measured))


@pytest.mark.slow
def test_the_bytes_are_those_that_deepspeed_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run_ranks(RANKS, measure, tmp_path)
    measured = json.loads((tmp_path / "measured0.json").read_text())
    parts = tuple(
        Part(kind, LAYERS * SIDE * SIDE, kind, "generator", "") for kind in ("trained", "frozen")
    )
    for stage, (name, precision) in itertools.product((1, 2, 3), PRECISIONS.items()):
        deepspeed = {"optimizer": ADAMW, "zero_optimization": {"stage": stage}, **precision}
        run = run_of("tiny/stage1")._replace(deepspeed=deepspeed)
        planned = sum(state_bytes(Plan(run, parts, ""), RANKS)) / (LAYERS * SIDE * SIDE)
        assert measured[f"{name}_zero{stage}"] == pytest.approx(planned, rel=0.01), (name, stage)
