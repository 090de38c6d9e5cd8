"""The configuration: what right files, overrides and numbers of ranks resolve to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.config_files import ENCODER, dry_run, write_files
from vqrae_ds.config import ModelConfig, Run, describe, read_run, resolve_model
from vqrae_ds.config.deepspeed_json import batch_arithmetic


def read(folder: Path, *changes: str, **options: Any) -> Run:
    """The run of valid files with `changes`; `options` are those of `read_run`."""
    return read_run(*write_files(folder, *changes), **options)


def in_epochs(epochs: int, samples: int) -> tuple[str, ...]:
    """Changes that give the length in epochs."""
    return "-run.total_steps", f"run.epochs={epochs}", f"data.samples_per_epoch={samples}"


def test_dry_run_prints_the_run_and_its_arithmetic(tmp_path: Path) -> None:
    write_files(tmp_path, *in_epochs(30, 1000))
    status, output, errors, seconds = dry_run(tmp_path, "--gpus", "8", "run.seed=7")
    assert (status, errors) == (0, "")
    assert seconds < 5
    assert "  seed: 7\n" in output
    assert '"gradient_accumulation_steps": 8' in output
    assert "batch:  64 = 1 micro x 8 accumulated x 8 ranks\n" in output
    assert "length: 30 epochs x 1,000 samples / 64 = 468 steps, 29,952 images\n" in output


def test_ranks_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    output = dry_run(tmp_path).output
    assert "batch:  64 = 1 micro x 16 accumulated x 4 ranks\n" in output
    assert "length: run.total_steps = 100, 6,400 images\n" in output


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 64), (2, 32), (4, 16), (8, 8), (64, 1)])
def test_accumulation_follows_from_the_ranks(tmp_path: Path, ranks: int, accumulation: int) -> None:
    run = read(tmp_path, world_size=ranks)
    assert run.schedule.batch == (64, 1, accumulation, ranks, 1)
    assert run.deepspeed["gradient_accumulation_steps"] == accumulation
    assert run.deepspeed["train_batch_size"] == 64


@pytest.mark.parametrize(
    ("micro", "ranks", "possible"),
    [(1, 3, "1, 2, 4, 8"), (1, 128, "8, 16, 32, 64"), (16, 3, "1, 2, 4"), (64, 2, "1")],
)
def test_impossible_ranks_are_refused_with_possible_ones(
    micro: int, ranks: int, possible: str
) -> None:
    batch = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": micro}
    with pytest.raises(ValueError, match=f"{micro} x {ranks}; .* run on {possible} ranks$"):
        batch_arithmetic(batch, ranks)


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1, 6400, 100), (3, 6401, 300), (3, 65, 3), (1, 191, 2)]
)
def test_epochs_become_steps(tmp_path: Path, epochs: int, samples: int, steps: int) -> None:
    short_warmup = "deepspeed.scheduler.params.warmup_num_steps=1"
    run = read(tmp_path, *in_epochs(epochs, samples), short_warmup)
    assert run.schedule.total_steps == steps
    assert run.deepspeed["scheduler"]["params"]["total_num_steps"] == steps


def test_less_than_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.samples_per_epoch = 63 is less than .* = 64"):
        read(tmp_path, *in_epochs(1, 63))


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "run.seed=1",
        "run.seed=2",  # the last one counts, as for any option of a command line
        "losses.perceptual.weight=1e-4",
        "losses.adversarial=null",
        "monitor={num_images: 2}",
        "model.decoder.num_layers=5",
        "deepspeed.optimizer.params.lr=2e-4",
        "deepspeed.train_micro_batch_size_per_gpu=2",
    ]
    run = read(tmp_path, overrides=overrides)
    assert run.config.run.seed == 2
    assert run.config.losses.perceptual.weight == 1e-4
    assert run.config.losses.adversarial is None
    assert run.config.monitor.num_images == 2
    assert run.config.model.decoder.num_layers == 5
    assert run.deepspeed["optimizer"]["params"]["lr"] == 2e-4
    assert run.schedule.batch.accumulation == 32


def test_yaml_numbers_with_an_exponent(tmp_path: Path) -> None:
    config, deepspeed = write_files(tmp_path)
    config.write_text(config.read_text() + "lr_multiplier: {encoder: 1e-2, decoder: 5.e+1}\n")
    multiplier = read_run(config, deepspeed).config.lr_multiplier
    assert (multiplier.encoder, multiplier.decoder) == (0.01, 50.0)


OFFLOAD = "zero_optimization.offload_param"
UNTESTED = (f"deepspeed.{OFFLOAD}={{device: cpu}}", "deepspeed.prescale_gradients=true")


def test_untested_keys_can_be_allowed_by_name(tmp_path: Path) -> None:
    run = read(tmp_path, *UNTESTED, allowed_keys=[OFFLOAD, "prescale_gradients"])
    assert run.deepspeed["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert run.deepspeed["prescale_gradients"] is True


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (OFFLOAD, "prescale_gradients = true is an untested key"),
        ("prescale_gradient", f"prescale_gradient names no .*; it has {OFFLOAD}, prescale_grad"),
        (f"{OFFLOAD}.device", f"{OFFLOAD}.device names no untested key"),
        ("train_batch_size", "train_batch_size names no untested key"),
    ],
)
def test_untested_keys_that_are_not_allowed(tmp_path: Path, allowed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *UNTESTED, allowed_keys=[allowed])


def test_an_allowed_key_does_not_hide_another_mistake(tmp_path: Path) -> None:
    params = "deepspeed.optimizer.params={lr: 1.0, momentum: 0.9, fused: true}"
    with pytest.raises(ValueError, match="optimizer.params.momentum = 0.9 is no parameter of Adam"):
        read(tmp_path, params, allowed_keys=["optimizer.params.fused"])


def test_stage_1_trains_with_a_discriminator(tmp_path: Path) -> None:
    losses = read(tmp_path).config.losses
    assert losses.adversarial.weight == 0.1 and losses.distillation is None
    assert losses.adversarial.first_discriminator_step == losses.adversarial.start_step == 0
    assert read(tmp_path, "losses.adversarial=null").config.losses.adversarial is None
    start = "losses.adversarial={start_step: 9, discriminator_start_step: 5}"
    assert read(tmp_path, start).config.losses.adversarial.first_discriminator_step == 5


def consolidated(folder: Path, **changes: Any) -> tuple[str, str]:
    """Changes that start stage 2 from a folder of weights whose config.json has `changes`."""
    model = read(folder).config.model.model_dump() | changes
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "config.json").write_text(json.dumps(model))
    return "stage=2", f"init.model={folder / 'weights'}"


def test_stage_2_distils_twice(tmp_path: Path) -> None:
    stage2 = consolidated(tmp_path)
    losses = read(tmp_path, *stage2).config.losses
    assert losses.adversarial is None
    assert (losses.distillation.quantized.weight, losses.distillation.teacher.weight) == (1, 1)
    losses = read(tmp_path, *stage2, "losses.distillation.teacher.weight=0").config.losses
    assert (losses.distillation.quantized.weight, losses.distillation.teacher.weight) == (1, 0)
    losses = read(tmp_path, *stage2, "losses.distillation=null").config.losses
    assert losses.distillation is None


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"num_embeddings": 3}, "model.num_embeddings = 512 differs from 3 in "),
        ({"decoder": {"num_heads": 3}}, "model.decoder.hidden_size = 96 differs from null in "),
        ({"encoder_config": ENCODER | {"hidden_size": 8}}, "hidden_size = 96 differs from 8 in "),
        ({"old_name": 3}, "init.model: .*config.json: old_name = 3 is not a known key"),
        ({"embedding_dim": "x"}, 'init.model: .*: embedding_dim = "x" must be a whole number'),
    ],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path, theirs: dict[str, Any], message: str
) -> None:
    stage2 = consolidated(tmp_path, **theirs)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *stage2)


def test_what_is_no_weight_may_change_between_the_stages(tmp_path: Path) -> None:
    stage2 = consolidated(tmp_path, legacy=False, commitment_cost=0.5)
    assert read(tmp_path, *stage2).config.model.commitment_cost == 0.25


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers = 3 of the encoder differs from 4 in "),
        ({"patch_size": 16}, r"patch_size = \[8, 8\] of the encoder differs from 16 in "),
        ({"model_type": "intern_vit_6b"}, "model_type = .* differs from .*intern_vit_6b"),
    ],
)
def test_weights_of_another_encoder_are_refused(
    tmp_path: Path, theirs: dict[str, Any], message: str
) -> None:
    (tmp_path / "pretrained").mkdir()
    weights = f"init.encoder_weights={tmp_path / 'pretrained'}"
    assert read(tmp_path, weights).config.stage == 1, "weights without a configuration"
    as_published = {**ENCODER, "image_size": 64, "initializer_range": 1e-10, "dtype": "bfloat16"}
    path = tmp_path / "pretrained" / "config.json"
    path.write_text(json.dumps(as_published))
    assert read(tmp_path, weights).config.stage == 1
    path.write_text(json.dumps({**as_published, **theirs}))
    with pytest.raises(ValueError, match=message):
        read(tmp_path, weights)


def test_folder_of_weights_without_a_configuration(tmp_path: Path) -> None:
    stage2 = consolidated(tmp_path)
    (tmp_path / "weights" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="init.model: .*config.json is not valid JSON"):
        read(tmp_path, *stage2)
    (tmp_path / "weights" / "config.json").unlink()
    with pytest.raises(ValueError, match="init.model: .*config.json: no such file"):
        read(tmp_path, *stage2)


def test_decoder_mirrors_the_encoder(tmp_path: Path) -> None:
    model = read(tmp_path).config.model
    assert model.encoder_config == ENCODER
    assert (model.image_size, model.patch_size) == (64, 8)
    assert model.decoder.model_dump() == {
        "hidden_size": 96,
        "num_layers": 3,
        "num_heads": 6,
        "intermediate_size": 200,
        "norm_type": "rms_norm",
        "use_qk_norm": True,
        "layer_scale_init_value": 0.2,
    }
    given = read(tmp_path, "model.decoder={hidden_size: 64, num_heads: 4, use_qk_norm: false}")
    expected = {"hidden_size": 64, "num_heads": 4, "use_qk_norm": False}
    assert given.config.model.decoder == model.decoder.model_copy(update=expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_recorded_configuration_gives_the_same_run(tmp_path: Path, stage: int) -> None:
    changes = ("losses.adversarial=null",) if stage == 1 else consolidated(tmp_path)
    config, deepspeed = write_files(tmp_path, *changes)
    run = read_run(config, deepspeed, overrides=["losses.perceptual.weight=1e-4"])
    recorded = tmp_path / "recorded.yaml"
    recorded.write_text(yaml.safe_dump(run.config.model_dump(), sort_keys=False))
    again = read_run(recorded, deepspeed)
    assert again == run
    assert describe(again) == describe(run)


def test_frozen(tmp_path: Path) -> None:
    run = read(tmp_path)
    sections = [run.config, *(getattr(run.config, name) for name in ("run", "model", "losses"))]
    for section in [*sections, run.config.losses.adversarial, run.config.model.decoder]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, next(iter(type(section).model_fields)), None)
    with pytest.raises(AttributeError):
        run.schedule.total_steps = 1


def test_the_encoder_configuration_is_not_shared_with_the_caller() -> None:
    theirs = copy.deepcopy(ENCODER)
    model = resolve_model(ModelConfig(encoder_config=theirs))
    theirs["patch_size"][0] = 4
    theirs["hidden_size"] = 1
    assert model.encoder_config == ENCODER


def test_paths_can_be_left_for_later(tmp_path: Path) -> None:
    gone = ("data.train=gone", "init={model: gone}", "stage=2")
    with pytest.raises(ValueError, match='data.train = "gone" does not exist'):
        read(tmp_path, *gone)
    assert read(tmp_path, *gone, check_paths=False).config.init.model == "gone"
    with pytest.raises(ValueError, match="model.encoder_config_path: gone is no folder"):
        read(tmp_path, "model.encoder_config_path=gone", check_paths=False)
