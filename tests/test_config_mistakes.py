"""Each mistake in the configuration is one line with the field's name, in time, before torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config_files import dry_run, refusal, write_files

HEAVY = {"torch", "torchvision", "deepspeed", "transformers"}

# What is changed in valid files; how the line starts; what it offers.
MISTAKES = [
    # Keys that are misspelt, untested or unknown.
    (
        "deepspeed.zero_optimizatoin={stage: 3}",
        'zero_optimizatoin = {"stage": 3} is an untested key',
        "did you mean zero_optimization?",
    ),
    (
        "deepspeed.zero_optimization.stage_3=1",
        "zero_optimization.stage_3 = 1 is",
        "mean zero_optimization.stage?",
    ),
    (
        "deepspeed.optimizer.params.learning_rate=1",
        "optimizer.params.learning_rate = 1 is",
        "did you mean optimizer.params.lr?",
    ),
    (
        "deepspeed.wall_clock_breakdown=true",
        "wall_clock_breakdown = true is an untested key",
        "--allow-untested-key wall_clock_breakdown lets it through",
    ),
    ("stge=1", "stge = 1 is not a key of the YAML", "did you mean stage?"),
    ("run.epoch=3", "run.epoch = 3 is not a key of the YAML", "did you mean run.epochs?"),
    (
        "losses.adversarial.weigth=1",
        "losses.adversarial.weigth = 1 is",
        "mean losses.adversarial.weight?",
    ),
    (
        "model.zzz=1",
        "model.zzz = 1 is not a key of the YAML",
        "known: encoder_cls, encoder_config_path",
    ),
    # Numbers that the other file owns.
    (
        "learning_rate=0.1",
        "learning_rate = 0.1 is not",
        "it belongs in the DeepSpeed JSON as optimizer.params.lr",
    ),
    (
        "data.train_batch_size=8",
        "data.train_batch_size = 8 is not",
        "deepspeed.train_batch_size=... on the command line",
    ),
    ("gradient_accumulation_steps=2", "gradient_accumulation_steps = 2 is not", "it is derived"),
    ("deepspeed.epochs=3", "epochs = 3 is an untested key", "did you mean run.epochs in the YAML?"),
    (
        "deepspeed.seed=1",
        "seed = 1 must not be in the DeepSpeed JSON",
        "it is run.seed in the YAML",
    ),
    (
        "deepspeed.scheduler.params.total_num_steps=9",
        "scheduler.params.total_num_steps = 9 must not",
        "run.total_steps in the YAML",
    ),
    # Wrong types and values.
    ("stage=true", "stage = true", "must be a whole number"),
    ("stage=3", "stage = 3", "must be at most 2"),
    ("run=null", "run = null", "must be a section with the keys output_dir"),
    ("losses=[gan]", 'losses = ["gan"]', "must be a section with the keys reconstruction"),
    ('run.total_steps="16"', 'run.total_steps = "16"', "must be a whole number"),
    ("data.train=''", 'data.train = ""', "must be text that is not empty"),
    ("model.encoder_cls=ViT", 'model.encoder_cls = "ViT"', "must be 'InternViT'"),
    ("model.commitment_cost=.inf", "model.commitment_cost = Infinity", "must be finite"),
    ("deepspeed.train_batch_size=auto", 'train_batch_size = "auto"', "give the value"),
    ('deepspeed.optimizer.params.lr="1e-3"', 'optimizer.params.lr = "1e-3"', "must be a number"),
    ("deepspeed.optimizer.params.lr=.nan", "optimizer.params.lr = NaN", "must be finite"),
    ("deepspeed.optimizer.params.betas=[0.9]", "optimizer.params.betas = [0.9]", "at least 2"),
    (
        "deepspeed.optimizer.params.momentum=0.9",
        "optimizer.params.momentum = 0.9",
        "no parameter of AdamW",
    ),
    ("deepspeed.optimizer.type=Adamw", 'optimizer.type = "Adamw"', "must be 'AdamW' or 'SGD'"),
    ('deepspeed.bf16.enabled="yes"', 'bf16.enabled = "yes"', "must be true or false"),
    ("deepspeed.zero_optimization.stage=4", "zero_optimization.stage = 4", "must be at most 3"),
    ("deepspeed.zero_optimization.stage=0", "zero_optimization.stage = 0", "must be at least 1"),
    (
        "-deepspeed.optimizer.params.torch_adam",
        "optimizer.params.torch_adam must be true",
        "is not tested here",
    ),
    (
        "deepspeed.optimizer={type: SGD, params: {lr: 1}}",
        "zero_allow_untested_optimizer must be true",
        "optimizer.type = SGD",
    ),
    # Terms that a run is too short for.
    (
        "losses.adversarial={start_step: 100}",
        "losses.adversarial.start_step = 100",
        "is not below the 100 steps of the run, and the term would never take part: set it lower, "
        "or losses.adversarial=null",
    ),
    (
        "losses.perceptual={start_step: 200}",
        "losses.perceptual.start_step = 200",
        "set it lower, or losses.perceptual=null",
    ),
    (
        "losses.quantizer={start_step: 100}",
        "losses.quantizer.start_step = 100",
        "set it lower, or losses.quantizer.weight=0",
    ),
    (
        "losses.adversarial={start_step: 60}",
        "losses.adversarial: the discriminator trains for the last 40 steps",
        "scheduler.params.warmup_num_steps = 50): set its start lower, or losses.adversarial=null",
    ),
    # What is missing, and what does not fit together.
    ("-data.train", "data.train is missing", "in the YAML"),
    ("-deepspeed.gradient_clipping", "gradient_clipping is missing", "in the DeepSpeed JSON"),
    ("deepspeed.scheduler.params={}", "scheduler.params.warmup_num_steps is missing", ""),
    ("-run.total_steps", "run.total_steps is missing", "run.epochs"),
    (
        "run.epochs=2",
        "run.total_steps = 100 is set",
        "run.epochs = 2: remove one of the two (run.total_steps=null, or run.epochs=null)",
    ),
    ("init.allow_untrained_encoder=false", "init.encoder_weights is missing", "name the folder"),
    ("stage=2", "init.model is missing", "tools/convert_checkpoint.py"),
    ("init={model: a, encoder_weights: b}", 'init.encoder_weights = "b"', "remove one of the two"),
    ("losses.distillation={}", "losses.distillation is set in stage 1", "remove it"),
    (
        "losses.adversarial={discriminator_start_step: 5}",
        "losses.adversarial.discriminator_start_step = 5",
        "is after start_step 0",
    ),
    ("model.image_size=60", "model.image_size = 60", "nearest: 56 or 64"),
    ("model.decoder.num_heads=5", "model.decoder.num_heads = 5", "these do: 3, 4, 6"),
    (
        "deepspeed.scheduler.params.warmup_num_steps=100",
        "scheduler.params.warmup_num_steps = 100",
        "not below the 100 steps of the run",
    ),
    (
        "deepspeed.train_micro_batch_size_per_gpu=5",
        "train_batch_size = 64 is not a multiple of train_micro_batch_size_per_gpu = 5",
        "nearest: 60 and 65",
    ),
    # The tokenizer's options.
    (
        "model.encoder_cls=DINOv2wNorm",
        'model.encoder_cls = "DINOv2wNorm" does not fit model_type "internvl_vision"',
        "that is InternViT",
    ),
    ("model.feature_layer=4", "model.feature_layer = 4 is no block", "1 to 3 from the first"),
    ("model.use_projections=false", "model.use_projections = false needs one width", "has 96"),
    ("model.ema_decay=0.5", "model.ema_decay = 0.5 has no effect", "model.use_simvq = true"),
    # Paths.
    ("data.train=no/folder", 'data.train = "no/folder" does not exist', "tools/make_shards.py"),
    (
        "data.validation=pyproject.toml",
        'data.validation = "pyproject.toml" is not a folder',
        "make_shards",
    ),
    (
        "losses.perceptual.weights=missing",
        'losses.perceptual.weights = "missing"',
        "tools/make_lpips_weights.py",
    ),
    (
        "model.encoder_config_path=lost",
        "model.encoder_config_path: lost is no folder, so there is no lost/config.json",
        "tools/import_encoder.py",
    ),
    ("-encoder.patch_size", "model.encoder_config_path: ", "config.json: patch_size is missing"),
    (
        'encoder.hidden_size="96"',
        "model.encoder_config_path: ",
        'hidden_size = "96" must be a whole number',
    ),
]


@pytest.mark.parametrize(("change", "start", "way_out"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistake_in_a_setting(tmp_path: Path, change: str, start: str, way_out: str) -> None:
    write_files(tmp_path, change)
    line = refusal(tmp_path)
    assert line.startswith(start) and way_out in line[len(start) :], line


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("run.total_step=5", "run.total_step = 5 is not a key of the YAML; did you mean run.total"),
        ("run.total_steps", "override 'run.total_steps' is not of the form a.b=value"),
        ("run.total_steps = 5", "override 'run.total_steps = 5' is not of the form a.b=value"),
        ("run.total_steps=", "override 'run.total_steps=' has no value"),
        ("run.total_steps=[5", "override 'run.total_steps=[5': while parsing a flow sequence"),
        ("stage.x=5", "override 'stage.x=5': stage is not a section"),
        (
            "deepspeed.train_batch_sise=5",
            "train_batch_sise = 5 is an untested key of the DeepSpeed",
        ),
        ("optimizer.params.lr=5", "it belongs in the DeepSpeed JSON as optimizer"),
        ("--gpus=0", "--gpus 0 is not a number of ranks"),
        ("--gpus=3", "with this micro batch it can run on 1, 2, 4, 8 ranks"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag (--help shows an example)"),
        ("--config=no.yaml", "--config: no.yaml: no such file or directory"),
        ("--config=tests", "--config: tests: is a directory"),
        ("--allow-untested-key=optimizer", "--allow-untested-key optimizer names no untested key"),
    ],
)
def test_mistake_on_the_command_line(tmp_path: Path, argument: str, expected: str) -> None:
    write_files(tmp_path)
    assert expected in refusal(tmp_path, argument)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.yaml", b"# stage: 1\n", "--config: {path} is empty"),
        ("config.yaml", b"- 1\n", "--config: {path} must hold keys and values, not [1]"),
        ("config.yaml", b"stage: 1\nstage: 2\n", "stage is given twice: 1 and 2"),
        ("config.yaml", b"run: {seed: 1, seed: 2}\n", "run.seed is given twice: 1 and 2"),
        ("config.yaml", b"run: [1, 2\nseed: 1\n", "{path} is not valid YAML: while parsing a flow"),
        ("config.yaml", b"run:\n\tseed: 1\n", "cannot start any token in line 2"),
        ("config.yaml", b"run.seed: 1\n", "run.seed = 1 is one key with dots"),
        ("config.yaml", b"1: 2\n", "the key 1 in the file must be printable text"),
        ("config.yaml", b"\xff\xfe", "{path} is not valid YAML: 'utf-8' codec can't decode byte"),
        ("deepspeed.json", b"{", "--deepspeed_config: {path} is not valid JSON: Expecting"),
        ("deepspeed.json", b"[]", "--deepspeed_config: {path} must hold keys and values, not []"),
        ("deepspeed.json", b'{"a": {"b": 3, "b": 0}}', "a.b is given twice: 3 and 0"),
        ("encoder/config.json", b"{", "model.encoder_config_path: {path} is not valid JSON"),
        ("encoder/config.json", b"[]", "model.encoder_config_path: {path} must hold keys and val"),
    ],
)
def test_file_that_cannot_be_read(tmp_path: Path, file: str, content: bytes, expected: str) -> None:
    write_files(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert expected.format(path=tmp_path / file) in refusal(tmp_path)


@pytest.mark.parametrize("world_size", ["x", "0"])
def test_world_size_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: str
) -> None:
    write_files(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert f"WORLD_SIZE = '{world_size}' in the environment is not" in refusal(tmp_path)


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["stage=3"], 2)])
def test_nothing_heavy_is_imported(tmp_path: Path, arguments: list[str], status: int) -> None:
    write_files(tmp_path)
    done = dry_run(tmp_path, *arguments, python=("-X", "importtime"))
    lines = [line for line in done.errors.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert done.status == status
    assert {"vqrae_ds", "pydantic"} <= imported
    assert not imported & HEAVY
