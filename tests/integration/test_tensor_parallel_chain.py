"""Stage 1 -> stage2 folder -> stage 2 -> inference folder, tp 1 and tp 2: the same outputs.

What the live engines give is compared bit for bit with what a group of ranks makes of the folder.
One process adds up a row-cut layer in one go, so its pixels differ by rounding; its codes do not.
In bf16 that holds without DeepSpeed's `memory_efficient_linear`, which adds the bias to a product
that is rounded already, and stays in the process from the first engine on that has it.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.integration.test_tensor_parallel_checkpoints import FIELDS, make, train
from tests.tiny import images_of, make_setup, save_initial
from vqrae_ds import checkpoint
from vqrae_ds.config import Run
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.forward_check import compare_forward
from vqrae_ds.manifest import find_step_folder
from vqrae_ds.models.vqrae import VQRAE, read_config
from vqrae_ds.ops.nearest_code import nearest_code
from vqrae_ds.parallel.slices import own_slice, split_of
from vqrae_ds.preparation import Setup

pytestmark = pytest.mark.slow

RANKS, STEPS = 4, 2
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
KINDS = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero3": {"zero_optimization": ZERO_3},
    "zero3-bf16": {"zero_optimization": ZERO_3, **BF16},
}
CASES = [("zero1", 2), ("zero3", 2), ("zero3-bf16", 1), ("zero3-bf16", 2)]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of a pixel, absolute

Outputs = dict[str, torch.Tensor]


def outputs_of(model: Any) -> Outputs:
    """Of a fixed batch, the same on all ranks: pixels, codes and features."""
    model.eval()
    with torch.no_grad():
        output = model(images_of(0, 0))
    output = getattr(output, "vqrae", output)
    return {
        "pixels": output.reconstruction,
        "codes": output.indices_Bhw,
        "features": output.features_BND,
    }


def assert_equal(mine: Outputs, other: Outputs) -> None:
    for name, tensor in other.items():
        assert torch.equal(mine[name], tensor), name


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in KINDS[kind] else torch.float32


def from_folder(folder: Path, tensor_size: int, dtype: torch.dtype) -> VQRAE:
    """The model of a folder over tensor-parallel groups, without DeepSpeed."""
    from vqrae_ds.parallel.groups import make_groups
    from vqrae_ds.parallel.model import sliced_parts

    groups = make_groups(tensor_size, timedelta(seconds=60))
    config, weights = read_config(folder), load_file(folder / "model.safetensors")
    model = VQRAE(config=config, **sliced_parts(config.num_embeddings, groups, nearest_code))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            whole, split = weights[name], split_of(name)
            is_cut = groups is not None and split is not None
            tensor.copy_(own_slice(whole, split, groups.place) if is_cut else whole)
    return model


def convert(output: Path, run: Path, dtype: torch.dtype) -> Path:
    """On rank 0, with the tool's own verification; the others wait."""
    if dist.get_rank() == 0:
        step = find_step_folder(run)

        def check(written: Path) -> None:
            verify(step, written)
            assert compare_forward(step, written) is None

        consolidate(step, output, to=output.name, dtype=dtype, check=check)
    dist.barrier()
    return output


def run_chains(rank: int, root: Path) -> None:
    from deepspeed.utils import groups

    for kind, tensor_size in CASES:
        groups.mpu = None  # DeepSpeed keeps that of an engine before
        run_chain(rank, root, kind, tensor_size)


def run_chain(rank: int, root: Path, kind: str, tensor_size: int) -> None:
    dtype, folder = dtype_of(kind), root / f"{kind}-{tensor_size}"

    def begin(stage: int, **sections: Any) -> tuple[Run, Setup]:
        sections["run"] = {"output_dir": str(folder / f"run{stage}")}
        options = {"stage": stage, "deepspeed": KINDS[kind], **sections}
        run = make(rank, root, kind, tensor_size, **options)
        return run, make_setup(run)

    run, setup = begin(1)
    first = outputs_of(setup.generator)
    end1 = train_and_save(run, setup, rank)
    assert not torch.equal(end1["pixels"], first["pixels"])
    weights = convert(folder / "stage2", folder / "run1", torch.float32)

    run, setup = begin(2, init={"model": str(weights)})
    assert_equal(outputs_of(setup.generator), end1)
    end2 = train_and_save(run, setup, rank)
    assert not torch.equal(end2["features"], end1["features"])
    again = make_setup(run)
    checkpoint.resume(checkpoint.find(run), again.generator, again.discriminator, again.ema)
    assert_equal(outputs_of(again.generator), end2)
    inference = convert(folder / "inference", folder / "run2", dtype)

    assert_equal(outputs_of(from_folder(inference, tensor_size, dtype)), end2)
    torch.save(end2, folder / f"outputs{rank}.pt")


def train_and_save(run: Run, setup: Setup, rank: int) -> Outputs:
    setup.generator.train()
    train(run, setup, rank, 0, STEPS)
    setup.objective.settle()
    state = checkpoint.TrainState(STEPS, STEPS * 4)
    engines = (setup.generator, setup.discriminator)
    checkpoint.save(run, checkpoint.Content(*engines, state, ema=setup.ema))
    return outputs_of(setup.generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel_chain")
    save_initial(folder / "initial", FIELDS)
    run_ranks(RANKS, run_chains, folder, timeout_seconds=500)
    return folder


@pytest.mark.parametrize(("kind", "tensor_size"), CASES)
def test_one_process_gives_what_the_engines_do(folder, kind, tensor_size):
    case = folder / f"{kind}-{tensor_size}"
    live = [torch.load(case / f"outputs{rank}.pt") for rank in range(RANKS)]
    for other in live[1:]:
        assert_equal(other, live[0])
    alone = outputs_of(VQRAE.from_pretrained(case / "inference"))
    if tensor_size > 1:
        difference = (alone.pop("pixels") - live[0].pop("pixels")).abs().max()
        assert difference < ROUNDING[dtype_of(kind)]
    assert_equal(alone, live[0])
    assert len(alone["codes"].unique()) > 1
