"""Figures of images against the libraries that publish them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from tests.conftest import ROOT
from vqrae_ds.data.decode import as_bytes, load_image
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.evaluation.frechet import Moments, frechet_distance
from vqrae_ds.evaluation.inception import Inception
from vqrae_ds.evaluation.metrics import image_figures
from vqrae_ds.losses.perceptual import PerceptualLoss

SIDE = 64


@pytest.fixture(scope="module")
def images() -> Tensor:
    paths = find_images(ROOT / "tests/data/photos/val")
    return torch.stack([load_image(path, image_size=SIDE) for path in paths])


@pytest.fixture(scope="module")
def images_hat(images: Tensor) -> Tensor:
    """Noisy and coarse by turns, in 8 bit."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + 0.1 * noise).clamp(0, 1)
    coarse = nn.functional.avg_pool2d(images, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    is_noisy = torch.arange(len(images)) % 2 == 0
    return as_bytes(torch.where(is_noisy[:, None, None, None], noisy, coarse)).float() / 255


def test_figures_are_those_of_the_libraries(
    images: Tensor, images_hat: Tensor, lpips_weights: Path
) -> None:
    found = dict(image_figures(images_hat, images, PerceptualLoss(lpips_weights)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision in an old way
        network = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    state = load_file(lpips_weights)
    trunk = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    network.net.load_state_dict(trunk)
    with torch.no_grad():
        distances = network(images_hat * 2 - 1, images * 2 - 1).flatten()
    for number, pair in enumerate(zip(images, images_hat, strict=True)):
        ours, theirs = (side.permute(1, 2, 0).double().numpy() for side in pair)
        flat = np.broadcast_to(ours.mean((0, 1)), ours.shape)
        similarity = structural_similarity(
            ours,
            theirs,
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        expected = {
            "psnr": peak_signal_noise_ratio(ours, theirs, data_range=1.0),
            "baseline_psnr": peak_signal_noise_ratio(ours, flat, data_range=1.0),
            "ssim": similarity,
            "lpips": distances[number].item(),
        }
        assert {n: v[number].item() for n, v in found.items()} == pytest.approx(expected, abs=1e-6)


def test_eight_bit_values_come_back_and_halves_are_rounded_not_cut() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bytes(every.float() / 255), every)
    assert as_bytes(torch.tensor([0.6 / 255, 254.4 / 255])).tolist() == [1, 254]


def moments_of(rows: Tensor, piece: int) -> Moments:
    moments = Moments()
    for part in rows.split(piece):
        moments.add(part)
    moments.add(rows[:0])
    return moments


def peers_distance(first: Tensor, second: Tensor) -> float:
    statistics = [fid_features_to_statistics(rows.double()) for rows in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far_from_zero"])
def test_frechet_distance_is_torch_fidelitys_in_pieces_of_any_size(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    first = torch.randn(200, 24, generator=generator, dtype=torch.float64) @ mixing + offset
    second = torch.randn(150, 24, generator=generator, dtype=torch.float64) + offset + 0.3
    moments = moments_of(first, 7)
    expected = np.cov(first.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance().numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moments.mean().numpy(), first.numpy().mean(0), rtol=1e-12)
    distance = frechet_distance(moments, moments_of(second, 64))
    assert distance == pytest.approx(peers_distance(first, second), rel=1e-6)
    assert distance > 1


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Of one dimension it is (m1 - m2)^2 + (s1 - s2)^2."""
    first = torch.tensor([[1.0], [2.0], [3.0]])  # mean 2, variance 1
    second = torch.tensor([[3.0], [5.0], [7.0]])  # mean 5, variance 4
    pair = moments_of(first, 2), moments_of(second, 1)
    assert frechet_distance(*pair) == pytest.approx(9 + 1)
    assert frechet_distance(pair[0], pair[0]) == pytest.approx(0, abs=1e-12)


class RandomInception(FeatureExtractorInceptionV3):
    """The package's network with random weights, for it has no way to be built without a file."""

    def load_state_dict(self, *_: object, **__: object) -> None:
        torch.manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return RandomInception("random", ["2048"], nothing)


def test_distance_of_inception_features_is_torch_fidelitys(
    network: nn.Module, images: Tensor, images_hat: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    inception = Inception(path)
    assert not inception.is_canonical
    sides = [as_bytes(side[:4]) for side in (images, images_hat)]
    features = [network(side)[0] for side in sides]
    found = [inception(side) for side in sides]
    for ours, theirs in zip(found, features, strict=True):
        assert ours.shape == (4, 2048)
        torch.testing.assert_close(ours, theirs)
    # Of 2048 features every 32nd: the peer's root of the whole takes ten seconds.
    some = [side[:, ::32] for side in features]
    distance = frechet_distance(*(moments_of(side[:, ::32], 3) for side in found))
    assert distance == pytest.approx(peers_distance(*some), rel=1e-4)
    # Of the whole: with centred rows X and Y the trace of the root is the nuclear norm of X Y^T.
    first, second = (side.double().numpy() for side in features)
    X, Y = first - first.mean(0), second - second.mean(0)
    trace = np.linalg.svd(X @ Y.T, compute_uv=False).sum()
    offset = ((first.mean(0) - second.mean(0)) ** 2).sum()
    expected = offset + ((X**2).sum() + (Y**2).sum() - 2 * trace) / (len(X) - 1)
    whole = frechet_distance(*(moments_of(side, 3) for side in found))
    assert whole == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "which is missing"),
        ("text.pth", b"not weights", "is not a file of weights"),
        ("text.safetensors", b"not weights", "is not a file of weights"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Inception(tmp_path / name)


def test_another_network_is_refused_and_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds another network than this Inception"):
        Inception(tmp_path / "other.safetensors")
    torch.save(Touch(tmp_path / "was_run"), tmp_path / "code.pth")
    with pytest.raises(ValueError, match="is not a file of weights"):
        Inception(tmp_path / "code.pth")
    assert not (tmp_path / "was_run").exists()


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
