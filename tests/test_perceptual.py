"""The perceptual loss against the lpips package, on a photograph, and without its weights."""

from __future__ import annotations

import io
import socket
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import ROOT
from vqrae_ds.losses.perceptual import PerceptualLoss, find_weights

PHOTO = ROOT / "tests/data/photos/val/categorization_fishes_fish5.webp"


@pytest.fixture(scope="module")
def loss(lpips_weights: Path) -> PerceptualLoss:
    return PerceptualLoss(lpips_weights)


@pytest.fixture(scope="module")
def reference(lpips_weights: Path) -> nn.Module:
    """The package's own LPIPS: our trunk, but the heads that the package brings along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision in an old way
        model = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
    state = load_file(lpips_weights)
    trunk = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    model.net.load_state_dict(trunk)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(PHOTO).convert("RGB").resize((128, 128), Image.Resampling.BOX)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a connection was attempted")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def _random_pair(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = torch.rand(2, 3, 3, size, size, generator=generator)
    return pair[0], pair[1]


def test_value_and_gradient_are_those_of_lpips(loss: PerceptualLoss, reference: nn.Module) -> None:
    images_hat, images = _random_pair()
    ours_hat, theirs_hat = images_hat.clone().requires_grad_(), images_hat.clone().requires_grad_()
    ours_B = loss(ours_hat, images)
    theirs_B111 = reference(2 * theirs_hat - 1, 2 * images - 1)
    assert ours_B.shape == (3,)
    torch.testing.assert_close(ours_B, theirs_B111.flatten(), rtol=1e-6, atol=1e-6)

    ours_B.mean().backward()
    theirs_B111.mean().backward()
    assert ours_hat.grad.abs().sum() > 0
    torch.testing.assert_close(ours_hat.grad, theirs_hat.grad, rtol=1e-5, atol=1e-9)


def test_the_target_receives_no_gradient_and_keeps_no_activation(loss: PerceptualLoss) -> None:
    def saved_bytes(images_hat: Tensor, images: Tensor) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            loss(images_hat, images)
        return sum(sizes)

    images_hat, images = (image.requires_grad_() for image in _random_pair())
    loss(images_hat, images).sum().backward()
    assert images.grad is None and images_hat.grad is not None
    assert saved_bytes(images_hat, images) == saved_bytes(images_hat, images.detach())
    assert saved_bytes(images_hat.detach(), images) == 0


def test_equal_images_have_distance_zero(loss: PerceptualLoss, photo: Image.Image) -> None:
    image = _to_tensor(photo)
    assert loss(image, image.clone()).item() == 0


def test_distances_rank_damage_as_an_eye_does(loss: PerceptualLoss, photo: Image.Image) -> None:
    image = _to_tensor(photo)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=10)
    compressed = _to_tensor(Image.open(file))
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    rows = torch.randperm(image.shape[2], generator=torch.Generator().manual_seed(0))
    jpeg, blur, shuffled = (
        loss(damaged, image).item() for damaged in (compressed, blurred, image[:, :, rows])
    )
    assert 0.05 < jpeg < shuffled
    assert 0.05 < blur < shuffled


def test_a_photograph_keeps_its_figures(loss: PerceptualLoss, photo: Image.Image) -> None:
    """Figures of weights that give 0.5686 and 0.4217 on the example images of the LPIPS authors."""
    image = _to_tensor(photo)
    figures = [loss(other, image).item() for other in (image.flip(3), image.flip(1), 1 - image)]
    assert figures == pytest.approx([0.6282, 0.2787, 0.6749], abs=1e-3)  # mirrored, BGR, negative


def test_autocast_and_bfloat16_change_no_digit(loss: PerceptualLoss) -> None:
    images_hat, images = (image.bfloat16() for image in _random_pair())
    plain = loss(images_hat.float(), images.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(images_hat, images)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_training_mode_of_the_model_around_changes_nothing(loss: PerceptualLoss) -> None:
    images_hat, images = _random_pair()
    before = loss(images_hat, images)
    nn.ModuleList([loss]).train()
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert torch.equal(loss(images_hat, images), before)


def test_building_it_draws_no_random_number(lpips_weights: Path) -> None:
    before = torch.get_rng_state()
    PerceptualLoss(lpips_weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_values_that_are_not_finite_show_in_their_image_alone(loss: PerceptualLoss) -> None:
    images_hat, images = _random_pair()
    images_hat[1, 0, 4, 4] = float("nan")
    assert loss(images_hat, images).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(("value_hat", "value"), [(0.0, 1.0), (0.0, 0.0), (0.5, 0.0), (9.0, 0.0)])
def test_images_without_any_texture_have_finite_gradients(
    loss: PerceptualLoss, value_hat: float, value: float
) -> None:
    images_hat = torch.full((1, 3, 32, 32), value_hat, requires_grad=True)
    distance = loss(images_hat, torch.full((1, 3, 32, 32), value))
    distance.sum().backward()
    assert distance.isfinite().all() and images_hat.grad.isfinite().all()


def test_where_no_channel_responds_the_gradient_is_finite(
    lpips_weights: Path, tmp_path: Path
) -> None:
    """Features of length 0 have a root without derivative; the ReLU before it lets none through."""
    silent = load_file(lpips_weights)
    silent["net.slice5.28.bias"] = torch.full_like(silent["net.slice5.28.bias"], -1e6)
    save_file(silent, tmp_path / "silent.safetensors")
    loss = PerceptualLoss(tmp_path / "silent.safetensors")
    images_hat, images = _random_pair()
    assert not loss.graph.net(images)[4].any()
    loss(images_hat.requires_grad_(), images).sum().backward()
    assert images_hat.grad.isfinite().all() and images_hat.grad.any()


def test_sixteen_pixels_are_enough_and_fifteen_are_not(loss: PerceptualLoss) -> None:
    assert loss(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).item() > 0
    with pytest.raises(ValueError, match="15 x 64 px"):
        loss(torch.zeros(1, 3, 15, 64), torch.zeros(1, 3, 15, 64))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_other_shapes_are_refused(loss: PerceptualLoss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        loss(torch.zeros(shape), torch.zeros(2, 3, 32, 32))


def test_torchvision_cache_and_our_file_agree(
    loss: PerceptualLoss,
    lpips_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: None,
) -> None:
    state = load_file(lpips_weights)
    trunk = {
        "features." + name.split(".", 2)[2]: value
        for name, value in state.items()
        if name.startswith("net.")
    }
    cache = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cache.parent.mkdir(parents=True)
    torch.save({**trunk, "classifier.0.bias": torch.zeros(4096)}, cache)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_weights(None) == cache

    from_cache = PerceptualLoss(None)
    assert from_cache.graph.state_dict().keys() == state.keys()
    assert torch.equal(from_cache(*_random_pair()), loss(*_random_pair()))


@pytest.mark.parametrize("given", [True, False])
def test_missing_weights_say_what_to_do_and_fetch_nothing(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "absent.safetensors" if given else None
    for attempt in (find_weights, PerceptualLoss):
        with pytest.raises(ValueError) as refusal:
            attempt(weights)
        message = str(refusal.value)
        assert str(tmp_path) in message
        assert "python tools/make_lpips_weights.py OUT" in message
        assert "losses.perceptual.weights" in message


def test_files_that_hold_something_else_are_refused(
    lpips_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "partial.safetensors"
    state = load_file(lpips_weights)
    del state["lin4.model.1.weight"]
    save_file(state, partial)
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"not a safetensors file")
    for path in (partial, noise):
        with pytest.raises(ValueError, match=f"{path.name} does not hold"):
            PerceptualLoss(path)

    cache = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cache.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for content in (b"", b"not a pickle"):
        cache.write_bytes(content)
        with pytest.raises(ValueError, match=f"{cache.name} does not hold"):
            PerceptualLoss(None)
