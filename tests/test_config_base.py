"""A recipe over its `base`: what it resolves to, and mistakes in either file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.config_files import dry_run, refusal, write_files
from vqrae_ds.config import TrainConfig, read_run

BASE = """\
stage: 1
run: {output_dir: OUT, epochs: 3, seed: 5}
model: {encoder_config_path: ENCODER, num_embeddings: 512, decoder: {num_layers: 2, num_heads: 4}}
init: {allow_untrained_encoder: true}
data: {train: DATA, samples_per_epoch: 6400}
losses: {perceptual: {weight: 0.5}, adversarial: {start_step: 7}}
"""


def write_variant(folder: Path, base: str, variant: str) -> None:
    """Write config.yaml as a variant of recipes/base.yaml, with an encoder and data that exist."""
    write_files(folder)
    (folder / "recipes").mkdir()
    for word in ("out", "encoder", "data"):
        base = base.replace(word.upper(), str(folder / word))
    (folder / "recipes" / "base.yaml").write_text(base)
    (folder / "config.yaml").write_text(f"base: recipes/base.yaml\n{variant}")


def read_variant(folder: Path, variant: str, *overrides: str) -> TrainConfig:
    write_variant(folder, BASE, variant)
    return read_run(folder / "config.yaml", folder / "deepspeed.json", overrides=overrides).config


def test_a_variant_states_what_differs(tmp_path: Path) -> None:
    variant = """\
run: {epochs: null, total_steps: 90}
model: {decoder: {num_layers: 1}}
losses: {perceptual: null, adversarial: {weight: 0.2}}
"""
    config = read_variant(tmp_path, variant, "run.seed=6", "model.decoder.num_heads=3")
    assert (config.run.epochs, config.run.total_steps, config.run.seed) == (None, 90, 6)
    assert (config.model.decoder.num_layers, config.model.decoder.num_heads) == (1, 3)
    assert config.model.num_embeddings == 512
    assert config.losses.perceptual is None, "null replaces a section"
    assert (config.losses.adversarial.weight, config.losses.adversarial.start_step) == (0.2, 7)


def test_a_section_replaces_what_is_none(tmp_path: Path) -> None:
    text = BASE.replace("adversarial: {start_step: 7}", "adversarial: null")
    write_variant(tmp_path, text, "losses: {adversarial: {weight: 0.3}, perceptual: {}}")
    losses = read_run(tmp_path / "config.yaml", tmp_path / "deepspeed.json").config.losses
    assert (losses.adversarial.weight, losses.perceptual.weight) == (0.3, 0.5)


def test_a_variant_of_nothing_is_its_base(tmp_path: Path) -> None:
    variant = read_variant(tmp_path, "")
    base = read_run(tmp_path / "recipes" / "base.yaml", tmp_path / "deepspeed.json").config
    assert variant == base


def test_the_recorded_variant_is_whole(tmp_path: Path) -> None:
    write_variant(tmp_path, BASE, "run: {seed: 8}")
    status, output, errors, _ = dry_run(tmp_path)
    assert (status, errors) == (0, "")
    assert "  seed: 8\n" in output and "  epochs: 3\n" in output
    assert "base" not in yaml.safe_load(output.partition("\n{")[0])
    run = read_run(tmp_path / "config.yaml", tmp_path / "deepspeed.json")
    recorded = tmp_path / "recorded.yaml"
    recorded.write_text(yaml.safe_dump(run.config.model_dump()))
    assert read_run(recorded, tmp_path / "deepspeed.json") == run


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("base: 3", "--config: {config}: base = 3 must be the path of a YAML file"),
        ("base: ''", '--config: {config}: base = "" must be the path'),
        ("base: gone.yaml", "--config: {config}: base: {folder}/gone.yaml: no such file or dir"),
        ("base: data", "--config: {config}: base: {folder}/data: is a directory"),
        ("base: bad.yaml", "--config: {config}: base: {folder}/bad.yaml is not valid YAML: while"),
        ("base: list.yaml", "base: {folder}/list.yaml must hold keys and values, not [1]"),
        ("base: config.yaml", 'base = "config.yaml", and {config} has the key base itself'),
        ("base: two.yaml", 'base = "two.yaml", and {folder}/two.yaml has the key base itself'),
        ("base: base.yaml\nbase: base.yaml", "base is given twice"),
        # Mistakes in the settings: in the base, in the variant, between the two.
        (
            "base: base.yaml\nrun: {seed: 2}",
            "stge = 1 is not a key of the YAML; did you mean st",
        ),
        ("base: base.yaml\nrun: {seed: 2}", "(and 1 more) (stge stands in {folder}/base.yaml)"),
        ("base: good.yaml\nrun: {seed: -2}", "run.seed = -2 must be at least 0\n"),
        ("base: good.yaml\nrun: {epochs: 2}", "run.total_steps = 100 is set, and so is run.epochs"),
    ],
)
def test_mistake_in_a_base(tmp_path: Path, base: str, expected: str) -> None:
    config, _ = write_files(tmp_path)
    text = config.read_text()
    for name, content in {
        "good.yaml": text,
        "base.yaml": text.replace("stage: 1", "stge: 1"),
        "bad.yaml": "run: [1\n",
        "list.yaml": "- 1\n",
        "two.yaml": "base: good.yaml\n",
    }.items():
        (tmp_path / name).write_text(content)
    config.write_text(base)
    assert expected.format(config=config, folder=tmp_path) in refusal(tmp_path) + "\n"


def test_a_base_is_no_override(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert 'base = "x.yaml" is no override: it is a key of' in refusal(tmp_path, "base=x.yaml")
