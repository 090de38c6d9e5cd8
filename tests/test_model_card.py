"""The card beside a model's weights says what the model is, and its example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.conftest import run_python
from tests.tiny import build_model
from tests.zero_files import seal, write_model_step
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.record import find_damage, read_record
from vqrae_ds.models.model_card import CARD, TO_FILL_IN, model_card


def rows(card: str) -> dict[str, str]:
    """The table of a card."""
    return dict(re.findall(r"^\| (\w[\w ]+) \| (.+) \|$", card, re.MULTILINE))


def test_a_card_says_what_the_model_is(tmp_path: Path) -> None:
    model = build_model(fields={"num_embeddings": 100})
    model.save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    images = torch.rand(1, 3, 32, 32)
    grid = tuple(model.encode_to_indices(images).shape[1:])
    assert grid == (4, 4)
    assert rows(card) == {
        "encoder": "InternViT: 2 blocks x 48, 3 heads, patches of 8 pixels",
        "codebook": "SimVQ: 100 codes of 16 dimensions, 6.644 bits a token",
        "decoder": "ViT: 2 blocks x 48, 3 heads",
        "image size in training": "32 x 32 pixels",
        "tokens an image": "4 x 4 = 16, one for 8 x 8 pixels",
        "compression": "231.2 times, of 24 bits a pixel",
    }
    assert card.count(TO_FILL_IN) == 6
    assert f"{TO_FILL_IN}: the published weights that the training began with" in card
    assert max(map(len, card.split("\n"))) <= 120


def test_a_card_of_moving_averages_and_another_token() -> None:
    fields = {"use_simvq": False, "output_patch_size": 16, "image_size": 64, "feature_layer": 1}
    table = rows(model_card(build_model(fields=fields).config))
    assert table["codebook"].startswith("moving averages: 64 codes")
    assert table["tokens an image"] == "4 x 4 = 16, one for 16 x 16 pixels"
    assert table["encoder"].startswith("InternViT: 1 blocks x 48")
    assert table["encoder"].endswith("patches of 8 pixels")


def test_the_example_of_a_card_runs(tmp_path: Path) -> None:
    build_model().save_pretrained(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (tmp_path / CARD).read_text(), re.DOTALL)
    script = tmp_path / "example.py"
    shapes = "print([tuple(x.shape) for x in (features, indices, images_hat)])\n"
    script.write_text(example.replace('"PATH"', repr(str(tmp_path))) + shapes)
    done = run_python(str(script))
    assert done.stdout == "[(1, 16, 48), (1, 4, 4), (1, 3, 32, 32)]\n", done.stderr
    for shape in ("(B, 16, 48)", "(B, 4, 4) int64, 0 to 63", "(B, 3, 32, 32)"):
        assert shape in example


def test_what_was_filled_in_stays(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("mine")
    build_model().save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


def test_a_conversion_for_inference_has_a_card_that_may_be_filled_in(tmp_path: Path) -> None:
    step = tmp_path / "step_00001000"
    model = write_model_step(step)
    for target in ("stage2", "inference"):
        consolidate(step, tmp_path / target, to=target)
    assert not (tmp_path / "stage2" / CARD).exists()
    path = tmp_path / "inference" / CARD
    assert path.read_text() == model_card(model.config)
    path.write_text("filled in")
    assert not find_damage(path.parent, read_record(path.parent))


def test_a_configuration_that_is_not_understood_gets_no_card(tmp_path: Path, caplog) -> None:
    step = tmp_path / "step_00001000"
    write_model_step(step)
    (step / "model_config.json").write_text('{"num_embeddings": 64, "of_another_version": 1}')
    seal(step, step=1000, world_size=2)
    consolidate(step, tmp_path / "out", to="inference")
    assert not (tmp_path / "out" / CARD).exists()
    assert "no README.md: config.json does not describe a model: of_another_version" in caplog.text
