"""What trains wrongly or not at all in DeepSpeed is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config_files import write_files
from vqrae_ds.config import read_run

BF16_STATES = "deepspeed.bf16={enabled: true, bf16_master_weights_and_grads: true"
PLAIN_LINEAR = "deepspeed.zero_optimization.memory_efficient_linear=false"
STAGE_2 = ("stage=2", "-init", "init.model=.")

REFUSED = [  # what is changed in valid files, and the whole refusal
    (
        ("memory.decoder_checkpointing=selective",),
        'memory.decoder_checkpointing = "selective" trains wrongly with ZeRO-3\'s own linear layer:'
        " set deepspeed.zero_optimization.memory_efficient_linear=false, or take full",
    ),
    (
        (*STAGE_2, "memory.encoder_checkpointing=selective"),
        'memory.encoder_checkpointing = "selective" trains wrongly with ZeRO-3\'s own linear layer:'
        " set deepspeed.zero_optimization.memory_efficient_linear=false, or take full",
    ),
    (
        ("deepspeed.zero_optimization.zero_hpz_partition_size=3",),
        "zero_optimization.zero_hpz_partition_size = 3 does not divide the 4 ranks: set it to the "
        "GPUs of one node",
    ),
    (
        ("deepspeed.zero_optimization={stage: 2, zero_hpz_partition_size: 2}",),
        "zero_optimization.zero_hpz_partition_size = 2 has no effect with "
        "zero_optimization.stage = 2: remove it",
    ),
    (
        (BF16_STATES + "}",),
        "bf16.bf16_master_weights_and_grads = true must be the same as "
        "bf16.bf16_optimizer_states = null: with one alone DeepSpeed asks for its compiled "
        "optimizer, which is not tested here",
    ),
    (
        ("deepspeed.bf16={enabled: true, bf16_optimizer_states: true}",),
        "bf16.bf16_master_weights_and_grads = null must be the same as "
        "bf16.bf16_optimizer_states = true: with one alone DeepSpeed asks for its compiled "
        "optimizer, which is not tested here",
    ),
    (
        (BF16_STATES.replace("true,", "false,") + ", bf16_optimizer_states: true}",),
        "bf16.bf16_master_weights_and_grads = true has no meaning with bf16.enabled = false",
    ),
    (
        (
            BF16_STATES + ", bf16_optimizer_states: true}",
            "deepspeed.data_types.grad_accum_dtype=fp32",
        ),
        "bf16.bf16_master_weights_and_grads = true does not go with data_types.grad_accum_dtype = "
        '"fp32": remove one of the two',
    ),
    (
        (
            BF16_STATES + ", bf16_optimizer_states: true}",
            "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
        ),
        "bf16.bf16_master_weights_and_grads = true does not go with "
        "zero_optimization.offload_optimizer: DeepSpeed asks for its compiled optimizer then, "
        "which is not tested here",
    ),
    (
        ("deepspeed.zero_optimization.offload_optimizer={device: nvme}",),
        "zero_optimization.offload_optimizer.device = \"nvme\" must be 'cpu'",
    ),
    (
        ("deepspeed.zero_force_ds_cpu_optimizer=true",),
        "zero_force_ds_cpu_optimizer = true must be False",
    ),
]
ACCEPTED = [
    ("memory.decoder_checkpointing=selective", PLAIN_LINEAR),
    ("memory.decoder_checkpointing=selective", "deepspeed.zero_optimization={stage: 2}"),
    ("memory.encoder_checkpointing=selective",),  # frozen in stage 1, so it is not in effect
    ("memory.decoder_checkpointing=full", "memory.encoder_checkpointing=full"),
    ("deepspeed.zero_optimization.zero_hpz_partition_size=2",),
    ("deepspeed.zero_optimization={stage: 2, zero_hpz_partition_size: 1}",),
    (BF16_STATES + ", bf16_optimizer_states: true}",),
    ("deepspeed.zero_optimization.offload_optimizer={device: cpu, pin_memory: false}",),
]


def read(folder: Path, changes: tuple[str, ...]) -> None:
    paths = write_files(folder, *changes)
    read_run(*paths, world_size=4, check_paths=False)


@pytest.mark.parametrize(("changes", "refusal"), REFUSED, ids=[c[0][0][:60] for c in REFUSED])
def test_refused_in_one_line(tmp_path: Path, changes: tuple[str, ...], refusal: str) -> None:
    with pytest.raises(ValueError) as raised:
        read(tmp_path, changes)
    assert str(raised.value) == refusal


@pytest.mark.parametrize("changes", ACCEPTED, ids=lambda c: c[0][:60])
def test_accepted(tmp_path: Path, changes: tuple[str, ...]) -> None:
    read(tmp_path, changes)
