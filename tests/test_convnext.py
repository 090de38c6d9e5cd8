"""The ConvNeXt loss against an independent computation from the same file, and without the file."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import convnext_small

from vqrae_ds.losses.convnext import ConvNextLoss, find_weights


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random values with torchvision's names and shapes; block scales that let blocks be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in convnext_small().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        fan_in = max(torch.Size(shape[1:]).numel(), 1)
        values = torch.randn(shape, generator=generator) * (fan_in**-0.5 if len(shape) > 1 else 0.1)
        state[name] = values + 1 if len(shape) == 1 and name.endswith("weight") else values
        if name.endswith("layer_scale"):
            state[name] = 0.3 + 0.1 * torch.rand(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> Path:
    path = tmp_path_factory.mktemp("convnext") / "convnext_small-0c510722.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def loss(weights: Path) -> ConvNextLoss:
    return ConvNextLoss(weights)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a connection was attempted")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def _random_pair(side: int = 64) -> tuple[Tensor, Tensor]:
    return torch.rand(2, 2, 3, side, side, generator=torch.Generator().manual_seed(0)).unbind()


def layer_norm(x_BCHW: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mean, variance = x_BCHW.mean(1, keepdim=True), x_BCHW.var(1, correction=0, keepdim=True)
    normal = (x_BCHW - mean) / (variance + 1e-6).sqrt()
    return normal * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def logits_by_hand(images_B3HW: Tensor, w: dict[str, Tensor]) -> Tensor:
    """ConvNeXt-S by functions alone (arXiv:2201.03545): depths 3, 3, 27, 3."""
    x = F.interpolate(images_B3HW, size=224, mode="bilinear", align_corners=False, antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    x = F.conv2d(x, w["features.0.0.weight"], w["features.0.0.bias"], stride=4)
    x = layer_norm(x, w["features.0.1.weight"], w["features.0.1.bias"])
    for stage, depth in ((1, 3), (3, 3), (5, 27), (7, 3)):
        for block in (f"features.{stage}.{i}." for i in range(depth)):

            def of(layer: int, block: str = block) -> tuple[Tensor, Tensor]:
                return w[f"{block}block.{layer}.weight"], w[f"{block}block.{layer}.bias"]

            y = layer_norm(F.conv2d(x, *of(0), padding=3, groups=x.shape[1]), *of(2))
            y = F.linear(F.gelu(F.linear(y.movedim(1, -1), *of(3))), *of(5)).movedim(-1, 1)
            x = x + w[f"{block}layer_scale"] * y
        if stage < 7:
            down = f"features.{stage + 1}."
            x = layer_norm(x, w[f"{down}0.weight"], w[f"{down}0.bias"])
            x = F.conv2d(x, w[f"{down}1.weight"], w[f"{down}1.bias"], stride=2)
    x = layer_norm(x.mean((2, 3), keepdim=True), w["classifier.0.weight"], w["classifier.0.bias"])
    return F.linear(x.flatten(1), w["classifier.2.weight"], w["classifier.2.bias"])


def test_value_and_gradient_are_those_of_the_network_by_hand(
    loss: ConvNextLoss, state: dict[str, Tensor]
) -> None:
    images_hat, images = _random_pair()
    ours_hat, theirs_hat = images_hat.clone().requires_grad_(), images_hat.clone().requires_grad_()
    ours_B = loss(ours_hat, images)
    theirs_B = (logits_by_hand(theirs_hat, state) - logits_by_hand(images, state)).square().mean(1)
    assert ours_B.shape == (2,) and (ours_B > 1e-3).all()
    torch.testing.assert_close(ours_B, theirs_B, rtol=1e-3, atol=0)
    ours_B.sum().backward()
    theirs_B.sum().backward()
    scale = theirs_hat.grad.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(ours_hat.grad, theirs_hat.grad, rtol=0, atol=1e-3 * scale)


def test_equal_images_have_distance_zero_and_a_finite_gradient(loss: ConvNextLoss) -> None:
    for value in (0.0, 0.5):
        images_hat = torch.full((1, 3, 32, 32), value, requires_grad=True)
        distance = loss(images_hat, images_hat.detach().clone())
        assert distance.item() == 0
        distance.sum().backward()
        assert images_hat.grad.isfinite().all()


def test_the_target_receives_no_gradient_and_keeps_no_activation(loss: ConvNextLoss) -> None:
    images_hat, images = (image.requires_grad_() for image in _random_pair(32))
    loss(images_hat, images).sum().backward()
    assert images.grad is None and images_hat.grad.any()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        loss(images_hat.detach(), images)
    assert not sizes


def test_autocast_and_bfloat16_change_no_digit(loss: ConvNextLoss) -> None:
    images_hat, images = (image.bfloat16() for image in _random_pair(32))
    plain = loss(images_hat.float(), images.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(images_hat, images)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)


def test_training_mode_of_the_model_around_changes_nothing(loss: ConvNextLoss) -> None:
    before = loss(*_random_pair(32))
    nn.ModuleList([loss]).train()
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert torch.equal(loss(*_random_pair(32)), before)


def test_building_it_draws_no_random_number(weights: Path) -> None:
    before = torch.get_rng_state()
    ConvNextLoss(weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_shapes_are_refused(loss: ConvNextLoss) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        loss(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))


def test_safetensors_and_torchvision_cache_give_the_same(
    loss: ConvNextLoss,
    state: dict[str, Tensor],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: None,
) -> None:
    save_file(state, tmp_path / "convnext.safetensors")
    cache = tmp_path / "hub" / "checkpoints" / weights.name
    cache.parent.mkdir(parents=True)
    cache.symlink_to(weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_weights(None) == cache
    expected = loss(*_random_pair(32))
    for path in (None, tmp_path / "convnext.safetensors"):
        assert torch.equal(ConvNextLoss(path)(*_random_pair(32)), expected)


@pytest.mark.parametrize("given", [True, False])
def test_missing_weights_say_what_to_do_and_fetch_nothing(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "absent.pth" if given else None
    for attempt in (find_weights, ConvNextLoss):
        with pytest.raises(ValueError) as refusal:
            attempt(weights)
        message = str(refusal.value)
        assert str(tmp_path) in message and "\n" not in message
        assert "losses.convnext.weights" in message


def test_files_that_hold_something_else_are_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    short = {name: value for name, value in state.items() if name != "classifier.2.bias"}
    torch.save(short, tmp_path / "short.pth")
    torch.save({**state, "classifier.2.bias": torch.zeros(7)}, tmp_path / "wide.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({name: 1.0 for name in state}, tmp_path / "numbers.pth")
    torch.save(convnext_small, tmp_path / "code.pth")
    save_file(short, tmp_path / "short.safetensors")
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"{path.name} does not hold the weights"):
            ConvNextLoss(path)
