"""A run that starts from a converted folder, on real ranks: what is refused, what is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import gathered, run_ranks
from tests.tiny import images_of, make_rank_folders, make_run
from vqrae_ds import checkpoint
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run
from vqrae_ds.conversion.consolidate import consolidate, verify

pytestmark = pytest.mark.slow

NO_GAN = {"adversarial": None}
LOW = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
TRAINED = {"stage2": (2, {}), "low": (1, LOW), "plain": (1, {"bf16": {"enabled": True}})}
CONVERTED = {  # folder: the run, and for what it is converted
    "stage2": ("stage2", {"to": "stage2"}),
    "stage2_published": ("stage2", {"to": "inference"}),
    "low": ("low", {"to": "stage2"}),
    "low_averaged": ("low", {"to": "stage2", "ema": True}),
    "plain": ("plain", {"to": "stage2"}),
    "rounded": ("plain", {"to": "inference", "dtype": torch.bfloat16}),
}


def train_and_save(rank: int, folder: Path) -> None:
    from vqrae_ds import engines
    from vqrae_ds.sharding.ema import WeightAverage

    for name, (stage, deepspeed) in TRAINED.items():
        run = make_run(
            folder / f"rank{rank}",
            stage,
            losses=NO_GAN if stage == 1 else None,
            deepspeed=deepspeed,
            run={"output_dir": str(folder / name)},
        )
        engine = engines.build_generator(run)
        average = WeightAverage(engine, 0.9)
        output = engine(images_of(0, rank)).vqrae
        loss = output.patches_BhwP.float().square().mean() + output.vq_loss
        engine.backward(loss + output.features_BND.float().square().mean())
        engine.step()
        average.update()
        checkpoint.save(run, checkpoint.Content(engine, None, TrainState(1, 4), ema=average))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the converted folders of all runs."""
    folder = tmp_path_factory.mktemp("from_folder")
    make_rank_folders(folder, 2)
    run_ranks(2, train_and_save, folder)
    for name, (run, how) in CONVERTED.items():
        step = folder / run / "checkpoints" / "step_00000001"
        consolidate(step, folder / f"to_{name}", **how)
        verify(step, folder / f"to_{name}")
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("low", "bfloat16"),
        ("low_averaged", "float32"),
        ("plain", "float32"),
        ("rounded", "bfloat16"),
    ],
)
def test_the_record_has_the_dtype_that_was_written(folder, name, dtype):
    record = json.loads((folder / f"to_{name}" / "conversion.json").read_text())
    assert record["dtype"] == dtype
    weights = load_file(folder / f"to_{name}" / "model.safetensors")
    assert str(weights["decoder.head.weight"].dtype) == f"torch.{dtype}"


class Warnings(logging.Handler):
    """Keeps what is said of the weights."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def start(folder: Path, rank: int, stage: int, name: str, **changes: Any) -> Run:
    sections = {"run": {"output_dir": str(folder / "new")}, "init": {"model": str(folder / name)}}
    return checkpoint.resolve_start(make_run(folder / f"rank{rank}", stage, **sections, **changes))


def start_from_folders(rank: int, folder: Path) -> None:
    from vqrae_ds import engines

    for name in ("to_stage2", "to_stage2_published"):
        run = start(folder, rank, 2, name)
        assert run.config.losses.distillation.teacher.weight > 0
        expected = f"init.model: {folder / name} is of stage 2.*losses.distillation to null"
        with pytest.raises(ValueError, match=expected) as refused:
            engines.build_generator(run)
        assert "\n" not in str(refused.value)
        trained = load_file(folder / name / "model.safetensors")
        for run in (
            start(folder, rank, 2, name, losses={"distillation": None}),
            start(folder, rank, 1, name, losses=NO_GAN),
        ):
            module = engines.build_generator(run).module.vqrae.encoder
            with gathered(module):
                for path, parameter in module.named_parameters():
                    assert torch.equal(parameter, trained[f"encoder.{path}"]), path

    log = Warnings()
    logging.getLogger("vqrae_ds.sharding").addHandler(log)
    expected = {
        "to_low": "its run kept masters in bfloat16",
        "to_low_averaged": None,
        "to_plain": None,
        "to_rounded": "was converted for inference: it starts rounded to bfloat16",
    }
    for name, line in expected.items():
        log.lines.clear()
        engines.build_generator(start(folder, rank, 2, name))
        assert [line in found for found in log.lines] == ([] if line is None else [True]), name


def test_what_it_starts_from_is_said_and_a_trained_encoder_is_no_teacher(folder):
    run_ranks(2, start_from_folders, folder)
