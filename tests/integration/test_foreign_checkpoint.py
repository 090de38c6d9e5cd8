"""Checkpoints that plain DeepSpeed wrote: found by `latest`, converted with a warning, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import run_python
from tests.distributed import run_ranks
from tests.integration.test_conversion_zero import assert_same_bits, gather
from tests.tiny import ENCODER, MODEL, build_model, random_images
from vqrae_ds.conversion.checkpoint_source import find_checkpoint
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.forward_check import compare_forward
from vqrae_ds.conversion.inspection import inspect
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.models.vqrae import VQRAE, config_json

pytestmark = pytest.mark.slow

TOOL = "tools/convert_checkpoint.py"
STAGES = (1, 2, 3)


def write_checkpoints(rank: int, folder: Path) -> None:
    """A bare loop around the tokenizer itself, and one around the trainer's model of stage 1."""
    import deepspeed

    for stage in STAGES:
        for prefix in ("", "vqrae."):
            model = build_model()
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": stage == 3},
            }
            trained = [p for p in model.parameters() if p.requires_grad]
            engine, *_ = deepspeed.initialize(
                model=TrainingModel(model) if prefix else model,
                model_parameters=trained,
                config=config,
            )
            images = random_images()
            for _ in range(2):
                output = engine(images.bfloat16() if stage == 3 else images)
                output = output.vqrae if prefix else output
                engine.backward(output.patches_BhwP.float().square().mean() + output.vq_loss)
                engine.step()
            path = folder / f"zero{stage}{'_wrapped' if prefix else ''}"
            engine.save_checkpoint(str(path))
            held = gather(engine)
            if rank == 0:
                torch.save({n.removeprefix(prefix): t for n, t in held.items()}, path / "held.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run_ranks(2, write_checkpoints, folder)
    (folder / "config.json").write_text(config_json(build_model().config))
    (folder / "encoder").mkdir()
    recipe = {"stage": 1, "model": {**MODEL, "encoder_config": ENCODER}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("wrapped", ["", "_wrapped"])
@pytest.mark.parametrize("stage", STAGES)
def test_converts_what_the_engine_held(folder, tmp_path, caplog, stage, wrapped):
    run, config = folder / f"zero{stage}{wrapped}", folder / "config.json"
    checkpoint = find_checkpoint(run)
    assert checkpoint == run / "global_step2" == find_checkpoint(run / "global_step2")
    consolidate(checkpoint, tmp_path / "out", to="stage2", model_config=config)
    assert "no checksums, and nothing vouches for them" in caplog.text
    verify(checkpoint, tmp_path / "out", model_config=config)
    assert compare_forward(checkpoint, tmp_path / "out", model_config=config) is None
    held, found = torch.load(run / "held.pt"), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == held.keys()
    for name, tensor in found.items():
        assert_same_bits(tensor, held[name], name)
    VQRAE.from_pretrained(tmp_path / "out")
    shown = inspect(run, verify=True)
    assert shown.damage == [] and shown.facts["engine"] == f"ZeRO-{stage}, dp 2 x tp 1"
    assert shown.facts["step"] == "2" and len(shown.tensors) == len(held)


def test_the_command_line_asks_for_the_model_and_says_what_is_wrong(folder, tmp_path):
    run, out = str(folder / "zero3"), str(tmp_path / "out")

    def convert(path: str, *arguments: str) -> tuple[int, str]:
        done = run_python(TOOL, path, out, "--to", "inference", *arguments)
        return done.returncode, done.stderr

    status, error = convert(run)
    assert status == 2 and "give --model-config FILE" in error and error.count("\n") == 1
    (tmp_path / "other.json").write_text(config_json(build_model().config).replace("48", "96"))
    for config, message in {
        tmp_path / "other.json": "has shape (1, 1, 48), the model (1, 1, 96)",
        folder / "held.pt": "neither .yaml nor .json",
        tmp_path / "none.yaml": "no such file",
    }.items():
        status, error = convert(run, "--model-config", str(config))
        assert status == 2 and message in error, error
    assert not Path(out).exists()
    status, error = convert(run, "--model-config", str(folder / "recipe.yaml"), "--verify")
    assert status == 0 and "WARNING" in error, error


def test_damage_and_mixtures_are_found(folder, tmp_path):
    config = folder / "config.json"
    run = Path(shutil.copytree(folder / "zero3", tmp_path / "run"))
    path = run / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    intact = path.read_bytes()
    middle = len(intact) // 2
    path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        consolidate(run / "global_step2", tmp_path / "out", to="stage2", model_config=config)
    path.write_bytes(intact[:middle])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        consolidate(run / "global_step2", tmp_path / "out", to="stage2", model_config=config)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} missing"):
        consolidate(run / "global_step2", tmp_path / "out", to="stage2", model_config=config)
    path.write_bytes(intact)
    for text, message in (("../run", "no folder beside it"), ("global_step9", "holds no")):
        (run / "latest").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_checkpoint(run)
    (run / "latest").unlink()
    with pytest.raises(ValueError, match="name one of its folders, global_step2"):
        find_checkpoint(run)
    assert not (tmp_path / "out").exists()
