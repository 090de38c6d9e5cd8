"""A model on a whole set: by hand, over 1, 2 and 3 ranks, by the command line, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from tests.conftest import ROOT, run_python
from tests.distributed import run_ranks
from tests.launching import environment, free_port
from tests.tars import write_tar
from tests.tiny import ENCODER, IMAGE_SIZE, NUM_CODES, PATCH_SIZE, build_model
from vqrae_ds.config import DataConfig
from vqrae_ds.conversion.record import Record, write_record
from vqrae_ds.data.decode import load_image
from vqrae_ds.data.index import read_index
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.opening import Reader
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.evaluation.instruments import Wanted, open_instruments
from vqrae_ds.evaluation.joining import joined_ranks
from vqrae_ds.evaluation.labels import read_labels
from vqrae_ds.evaluation.measuring import Instruments
from vqrae_ds.evaluation.picture_page import choose_bands
from vqrae_ds.evaluation.set_report import as_markdown
from vqrae_ds.evaluation.set_summary import Subject, summarize_set
from vqrae_ds.evaluation.whole_set import measure_set
from vqrae_ds.models.vqrae import VQRAE

NUM_IMAGES = 11  # neither two nor three ranks, nor batches of two, divide it
PHOTOS = find_images(ROOT / "tests/data/photos/train")[:NUM_IMAGES]
TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
BAD = "bad"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the encoder that it began with, and two shards with classes and a bad image."""
    folder = tmp_path_factory.mktemp("evaluation")
    build_model(seed=1).save_pretrained(folder / "stage1")
    build_model(seed=1).encoder.model.save_pretrained(folder / "encoder")
    (folder / "encoder" / "config.json").write_text(json.dumps(ENCODER))
    trained = build_model(seed=1)
    with torch.no_grad():
        for parameter in trained.encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(folder / "model")
    for name in ("set", "set_with_bad"):
        (folder / name).mkdir()
        for shard in range(2):
            write_shard(folder / name / f"{shard}.tar", PHOTOS[shard::2], has_bad=name != "set")
        index_shards(folder / name)
    return folder


def write_shard(path: Path, photos: list[Path], *, has_bad: bool) -> None:
    members = {}
    for number, photo in enumerate(photos):
        members[f"{photo.stem}.webp"] = photo.read_bytes()
        members[f"{photo.stem}.cls"] = str(number % 2).encode()
        if number == 2 and has_bad:
            members[f"{BAD}{path.stem}.webp"] = b"no image"
    write_tar(path, members.items())


def random_features(images: torch.Tensor) -> torch.Tensor:
    """In the place of Inception, whose weights are not here: (B, 6) of 8-bit images."""
    weight = torch.randn(6, 3 * 64, generator=torch.Generator().manual_seed(0))
    coarse = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 8)
    return torch.tanh(coarse.flatten(1) @ weight.T)


def evaluate_on(rank: int, world_size: int, folder: Path, name: str, out: Path) -> None:
    """The numbers of the set, written by the first rank."""
    model = VQRAE.from_pretrained(folder / "model")
    original = VQRAE.from_pretrained(folder / "stage1").encoder
    index, data = read_index(folder / name), DataConfig(train=name, bad_samples="skip")
    instruments = Instruments(model, original, None, random_features)
    reader = Reader(rank, world_size)
    options = {"image_size": IMAGE_SIZE, "batch_size": 2}
    found = measure_set(instruments, index, data, reader, **options)
    first = measure_set(instruments, index, data, reader, **options, num_images=5)
    assert (found is None) == (rank != 0)
    if found is not None:
        is_first = found.numbers_n < 5
        assert torch.equal(first.numbers_n, found.numbers_n[is_first])
        assert torch.equal(first.figures["psnr"], found.figures["psnr"][is_first])
        report = summarize_set(
            Subject(Path("model"), model.config, torch.float32, name, IMAGE_SIZE),
            found,
            read_labels(index, "label"),
            is_canonical=False,
            left_out={},
        )
        assert found.numbers_n.tolist() == sorted(found.numbers_n.tolist())
        out.write_text(json.dumps(report, sort_keys=True))
    with pytest.raises(ValueError, match=f"sample '{BAD}"):  # on whichever rank it was read
        measure_set(instruments, index, DataConfig(train=name), reader, **options)


def test_the_numbers_are_the_same_on_1_2_and_3_ranks_and_those_of_a_loop(
    folder: Path, tmp_path: Path
) -> None:
    for world_size in (1, 2, 3):
        out = tmp_path / str(world_size)
        run_ranks(world_size, evaluate_on, world_size, folder, "set_with_bad", out)
    found = [(tmp_path / str(world_size)).read_text() for world_size in (1, 2, 3)]
    assert found[0] == found[1] == found[2], "to the last bit"
    report = json.loads(found[0])
    assert report["data"]["num_images"] == NUM_IMAGES and report["data"]["num_left_out"] == 2
    check_by_hand(report, folder)


def check_by_hand(report: dict, folder: Path) -> None:
    """One image at a time, with other libraries, without the index."""
    model = VQRAE.from_pretrained(folder / "model")
    original = VQRAE.from_pretrained(folder / "stage1").encoder
    psnrs, cosines, codes, rows = [], [], [], []
    for photo in PHOTOS:
        image = load_image(photo, image_size=IMAGE_SIZE)[None]
        with torch.no_grad():
            indices = model.encode_to_indices(image)
            image_hat = model.decode_from_indices(indices)
            pair = model.encode(image)[0].numpy(), original(image)[0].numpy()
        values = [np.rint(side[0].numpy() * 255).astype(np.uint8) for side in (image, image_hat)]
        psnrs.append(peak_signal_noise_ratio(*values))
        norms = [np.linalg.norm(side, axis=1) for side in pair]
        cosines.append(((pair[0] * pair[1]).sum(1) / norms[0] / norms[1]).mean())
        codes += indices.flatten().tolist()
        rows.append([random_features(torch.from_numpy(v)[None])[0].numpy() for v in values])
    assert report["figures"]["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-3)
    assert report["spread"]["psnr"]["least"] == pytest.approx(min(psnrs), abs=1e-3)
    assert report["retention"]["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert 0.1 < report["retention"]["cosine"] < 0.999
    counts = np.bincount(codes, minlength=NUM_CODES)
    assert report["codebook"]["usage"] == (counts > 0).mean()
    assert report["codebook"]["num_tokens"] == NUM_IMAGES * TOKENS == counts.sum()
    share = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-(share * np.log(share)).sum())
    assert report["codebook"]["perplexity"] == pytest.approx(perplexity)
    for entry in report["codebook"]["histogram"]:
        is_inside = (counts >= entry["uses_from"]) & (counts <= entry["uses_to"])
        assert entry["codes"] == is_inside.sum()
    assert sum(entry["codes"] for entry in report["codebook"]["histogram"]) == NUM_CODES
    first, second = (np.array(side, np.float64) for side in zip(*rows, strict=True))
    C1, C2 = (np.cov(side, rowvar=False) for side in (first, second))
    root = np.sqrt(np.linalg.eigvals(C1 @ C2).astype(complex)).real.sum()
    distance = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(C1 + C2) - 2 * root
    assert report["figures"]["frechet_other_inception"] == pytest.approx(distance, rel=1e-4)
    assert report["rate"]["compression_ratio"] == 24 * IMAGE_SIZE**2 / (TOKENS * 6)
    assert report["classes"]["num_classes"] == 2
    page = as_markdown(report)
    for title in ("PSNR, dB", "SSIM", "cosine of the tokens' features"):
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {title} |"))
        assert row.endswith(f"| {TOKENS} | 256 |"), "tokens and compression beside the figure"
    assert "2 images could not be used" in page


def test_bands_hold_no_image_twice_and_the_worst_ends_them() -> None:
    bands = choose_bands(torch.tensor([3.0, 9.0, 1.0, 5.0, 7.0, 5.0]))
    assert [band.places for band in bands] == [[1, 4], [3, 5], [0, 2]]
    assert [len(band.places) for band in choose_bands(torch.rand(100))] == [4, 4, 4]
    assert choose_bands(torch.tensor([1.0, 2.0]))[0].places == [1, 0]


def evaluate_arguments(folder: Path, out: Path) -> list[str]:
    options = ["--out", str(out), "--batch-size", "2", "--encoder", str(folder / "encoder")]
    return [str(folder / "model"), str(folder / "set"), *options]


@pytest.fixture(scope="module")
def evaluated(folder: Path, lpips_weights: Path) -> Path:
    """The report of a plain process."""
    out = folder / "report"
    arguments = [*evaluate_arguments(folder, out), "--lpips", str(lpips_weights)]
    done = run_python("tools/evaluate.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{out}: report.json, report.md and page.png" in done.stdout
    assert "left out: rfid: the canonical Inception weights are not given" in done.stdout
    return out


def test_the_tool_writes_numbers_page_and_picture(evaluated: Path) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    assert report["figures"].keys() == {"psnr", "baseline_psnr", "ssim", "lpips"}
    assert report["retention"]["knn_neighbours"] == 2
    assert report["left_out"].keys() == {"rfid"}
    assert report["classes"].keys() == {"num_images", "num_classes", "model", "original"}
    assert report["classes"]["num_images"] == NUM_IMAGES
    page = (evaluated / "report.md").read_text()
    assert f"| PSNR, dB | {report['figures']['psnr']:.2f} |" in page
    picture = np.asarray(Image.open(evaluated / "page.png").convert("RGB"))
    assert min(picture.shape[:2]) > 500 and picture.std() > 20


@pytest.mark.slow
def test_the_launcher_of_deepspeed_gives_the_same_report(
    folder: Path, evaluated: Path, lpips_weights: Path, tmp_path: Path
) -> None:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"),
            *("--master_addr", "127.0.0.1", "--master_port", str(free_port())),
            *("tools/evaluate.py", *evaluate_arguments(folder, tmp_path / "out")),
            *("--lpips", str(lpips_weights)),
        ],
        env={**environment(), "PYTHONPATH": search},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reports = [(place / "report.json").read_bytes() for place in (tmp_path / "out", evaluated)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--inception", "nowhere.pth"], "--inception nowhere.pth is missing"),
        (["--batch-size", "0"], "--batch-size 0 is not a number of 1 or more"),
        (["--encoder", "tests"], "--encoder tests has no config.json"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = [str(folder / "model"), str(folder / "set"), "--out", str(tmp_path / "out")]
    done = run_python("tools/evaluate.py", *arguments, *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_instruments_that_do_not_fit_are_refused_and_those_left_out_have_a_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # an empty cache
    wanted = Wanted(folder / "model", None, None, None)
    opening = {"dtype": None, "image_size": None, "device": torch.device("cpu")}
    opened = open_instruments(wanted, **opening)
    assert opened.left_out.keys() == {"rfid", "retention", "lpips"}
    small = open_instruments(wanted, **opening | {"image_size": 8, "dtype": "bf16"})
    assert small.left_out["ssim"] == "its window has 11 px, the images have 8"
    model = small.instruments.model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.standardize.mean.dtype == torch.float32
    with pytest.raises(ValueError, match="30 pixels are no multiple of 8, .* nearest: 24 or 32"):
        open_instruments(wanted, **opening | {"image_size": 30})
    build_model(fields={"feature_layer": 1}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="its feature_layer is not that of the model"):
        open_instruments(wanted._replace(original=tmp_path / "other"), **opening)
    shutil.copytree(folder / "stage1", tmp_path / "stage2")
    record = Record("stage2", "float32", False, 9, 2, {}, None, {})
    write_record(tmp_path / "stage2", record)
    with pytest.raises(ValueError, match="--encoder .*stage2 is of stage 2, .*import_encoder.py"):
        open_instruments(wanted._replace(original=tmp_path / "stage2"), **opening)
    write_record(tmp_path / "stage2", record._replace(stage=1))
    open_instruments(wanted._replace(original=tmp_path / "stage2"), **opening)
    for name in ("encoder", "stage1"):
        original = open_instruments(wanted._replace(original=folder / name), **opening)
        expected = build_model(seed=1).encoder.state_dict()
        for key, tensor in original.instruments.original.state_dict().items():
            assert torch.equal(tensor, expected[key])


def test_half_of_a_launchers_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="RANK is set, but the launcher's other words are not"):
        with joined_ranks():
            pass
