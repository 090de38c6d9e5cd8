"""Engines on two real ranks: each ZeRO stage, bf16, every tested key of the JSON, first weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import gathered, run_ranks
from tests.integration.test_memory_keys import BF16_STATES, OFFLOAD
from tests.tiny import DEEPSPEED, GAN, images_of, make_rank_folders, make_run, make_setup
from vqrae_ds.config import Run, deepspeed_json

pytestmark = pytest.mark.slow

STEPS = 3
LOSSES = {"perceptual": None, "adversarial": {"weight": 0.1, **GAN}}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
EVERY_KEY = {  # each key that config/deepspeed_schema.py calls tested, but those of OTHER_KEYS
    "gradient_clipping": 0.5,
    "tensor_parallel": {"autotp_size": 1},  # more: tests/integration/test_tensor_parallel.py
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.01,
            "torch_adam": True,
        },
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {
            "warmup_num_steps": 2,
            "warmup_min_ratio": 0.5,
            "warmup_type": "log",
            "cos_min_ratio": 0.1,
        },
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 1e5,
        "sub_group_size": 1e5,
        "stage3_prefetch_bucket_size": 1e5,
        "stage3_param_persistence_threshold": 10,
        "stage3_max_live_parameters": 1e6,
        "stage3_max_reuse_distance": 1e6,
        "memory_efficient_linear": False,
        "zero_hpz_partition_size": 2,
        **OFFLOAD,
    },
}
# What of these is the recipe; all others are about memory and communication.
RECIPE = ("gradient_clipping", "bf16", "data_types", "optimizer", "scheduler")
OTHER_KEYS = {  # those that do not go with all of the others
    "momentum": {"optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}},
    "bf16_states": {"optimizer": ADAMW, "bf16": {"enabled": True} | BF16_STATES},
}


def steps_of(rank: int, run: Run) -> list[float]:
    """The total losses of a few steps of the trainer; they are the same program at every stage."""
    from vqrae_ds.train import micro_step

    setup, losses = make_setup(run), []
    for step in range(STEPS):
        terms, _ = micro_step(setup, images_of(step, rank), step)
        losses.append(terms["loss/total"].item())
    return losses


def run_variants(rank: int, folder: Path) -> None:
    variants = {f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in (1, 2)}
    variants |= {"zero3": {}, "bf16": {"bf16": {"enabled": True}}}
    variants |= OTHER_KEYS
    variants["recipe"] = {name: EVERY_KEY[name] for name in RECIPE}
    variants["every_key"] = EVERY_KEY  # last: some of them hold for the rest of the process
    losses = {}
    for name, deepspeed in variants.items():
        mine = folder / f"rank{rank}"
        run = make_run(mine, 1, losses=LOSSES, deepspeed=deepspeed)
        losses[name] = steps_of(rank, run)
    (folder / f"losses{rank}.json").write_text(json.dumps(losses))


def run_first_weights(rank: int, folder: Path) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    from vqrae_ds import engines

    mine = folder / f"rank{rank}"
    run = make_run(mine, 1, losses=LOSSES, deepspeed={"bf16": {"enabled": True}})
    model = engines.build_generator(run).module
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weights = load_file(mine / "initial" / "model.safetensors")
    assert torch.equal(model.vqrae.standardize.mean, weights["standardize.mean"]), "kept in fp32"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
            assert torch.equal(master, weights[name.removeprefix("vqrae.")]), f"{name} was rounded"
    codebook = model.vqrae.quantizer.embedding.weight
    with gathered(model):
        assert torch.equal(codebook, weights["quantizer.embedding.weight"].bfloat16())

    check_buffers()

    untrained = {"init": {"model": None, "allow_untrained_encoder": True}}
    model = engines.build_generator(make_run(mine, 1, losses=LOSSES, **untrained)).module
    with gathered(model):
        state = {n: t.clone() for n, t in model.state_dict().items()}
    assert all(t.isfinite().all() for t in state.values())
    assert math.isclose(state["vqrae.quantizer.embedding.weight"].std(), 16**-0.5, rel_tol=0.1)
    assert (state["vqrae.decoder.head.bias"] == 0.5).all()
    assert (state["vqrae.decoder.blocks.0.scale1.scale"] == torch.tensor(0.1)).all()
    torch.save(state, folder / f"drawn{rank}.pt")


def check_buffers() -> None:
    """Below ZeRO-3 it is DeepSpeed that casts a model built in fp32; buffers are not to be cast."""
    import deepspeed

    for stage in (1, 2):
        model = torch.nn.Linear(4, 4)
        model.register_buffer("kernel", torch.full((4,), 1 / 3))
        config = {
            **DEEPSPEED,
            "bf16": {"enabled": True},
            "optimizer": ADAMW,
            "zero_optimization": {"stage": stage},
        }
        parameters = list(model.parameters())
        deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        assert model.weight.dtype == torch.bfloat16
        assert torch.equal(model.kernel, torch.full((4,), 1 / 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    make_rank_folders(folder, 2)
    run_ranks(2, run_first_weights, folder)
    run_ranks(2, run_variants, folder)
    return folder


@pytest.fixture(scope="module")
def losses(folder) -> dict[str, list[float]]:
    return json.loads((folder / "losses0.json").read_text())


@pytest.mark.parametrize("stage", [1, 2])
def test_every_zero_stage_takes_the_same_steps(losses, stage):
    assert losses[f"zero{stage}"] == pytest.approx(losses["zero3"], rel=1e-6)


def test_bf16_follows_fp32(losses):
    assert losses["bf16"] == pytest.approx(losses["zero3"], rel=0.02)
    assert losses["bf16"] != losses["zero3"]


def test_every_tested_key_runs_and_those_about_memory_and_communication_change_no_step(losses):
    used = set(deepspeed_json_names(copy.deepcopy(DEEPSPEED) | EVERY_KEY))
    assert losses["every_key"] == pytest.approx(losses["recipe"], rel=1e-6)
    assert losses["recipe"] != losses["bf16"]
    for name, keys in OTHER_KEYS.items():
        assert all(math.isfinite(loss) for loss in losses[name]), name
        used |= set(deepspeed_json_names(keys))
    assert used == set(deepspeed_json.tested_names())


def deepspeed_json_names(section: dict, prefix: str = "") -> list[str]:
    names = []
    for key, value in section.items():
        names.append(prefix + key)
        if isinstance(value, dict):
            names += deepspeed_json_names(value, f"{prefix}{key}.")
    return names


def test_ranks_draw_the_same_first_weights(folder):
    ours, theirs = (torch.load(folder / f"drawn{rank}.pt") for rank in range(2))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
