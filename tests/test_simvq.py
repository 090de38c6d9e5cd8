"""SimVQ against the textbook formula, and four facts that define the quantiser."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_nearest_code import assert_nearest, make_inputs
from vqrae_ds import SimVQ
from vqrae_ds.ops import nearest_code

K, D = 50, 12


def make_simvq(**options: object) -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(K, D, **options)


def random_z(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def textbook(simvq: SimVQ, z_BND: Tensor) -> tuple[Tensor, Tensor]:
    """The code of each token out of the whole projected codebook, and the loss of the paper."""
    codes_KD = simvq.embedding.weight @ simvq.embedding_proj.weight.T + simvq.embedding_proj.bias
    q_BND = codes_KD[torch.cdist(z_BND, codes_KD.expand(len(z_BND), -1, -1)).argmin(-1)]
    to_code = ((q_BND.detach() - z_BND) ** 2).mean()
    to_z = ((q_BND - z_BND.detach()) ** 2).mean()
    beta = simvq.commitment_cost
    return q_BND, to_code + beta * to_z if simvq.legacy else beta * to_code + to_z


class TestDefinition:
    """Document 003, "Verification Tests"."""

    def test_1_frozen_codebook(self) -> None:
        simvq = make_simvq()
        assert not simvq.embedding.weight.requires_grad
        assert all(parameter.requires_grad for parameter in simvq.embedding_proj.parameters())

    def test_2_forward_pass(self) -> None:
        torch.manual_seed(0)
        z = torch.randn(2, 512, 14, 14)
        z_q, loss, indices = SimVQ(num_embeddings=1024, embedding_dim=512)(z)
        assert z_q.shape == (2, 512, 14, 14)
        assert indices.shape == (2, 14, 14) and indices.dtype == torch.int64
        assert loss.item() == pytest.approx(1.2446, abs=0.01)

    def test_3_gradient_flow(self) -> None:
        simvq, z = make_simvq(), random_z(2, D, 3, 3).requires_grad_()
        z_q, loss, _ = simvq(z)
        (z_q.square().sum() + loss).backward()
        assert z.grad.abs().sum() > 0
        assert all(p.grad.abs().sum() > 0 for p in simvq.embedding_proj.parameters())
        assert simvq.embedding.weight.grad is None

    def test_4_l2_distance(self) -> None:
        """Not the cosine: a long code points nearer to z, a short one lies nearer."""
        simvq = SimVQ(2, 2)
        with torch.no_grad():
            simvq.embedding.weight.copy_(torch.tensor([[10.0, 0], [0.5, 0.5]]))
            simvq.embedding_proj.weight.copy_(torch.eye(2))
            simvq.embedding_proj.bias.zero_()
        assert simvq(torch.tensor([[[1.0, 0.1]]])).indices.item() == 1


@pytest.mark.parametrize("kind", ["random", "clustered", "shared offset"])
@pytest.mark.parametrize("tile", [4096, 11])
def test_indices_are_those_of_a_float64_search(
    monkeypatch: pytest.MonkeyPatch, kind: str, tile: int
) -> None:
    monkeypatch.setattr(nearest_code, "TILE_TOKENS", tile)
    monkeypatch.setattr(nearest_code, "TILE_CODES", tile)
    z_ND, codes_KD = make_inputs(kind, 105, K, D)
    simvq = make_simvq()
    with torch.no_grad():  # the projection is no identity
        weight, bias = simvq.embedding_proj.weight.double(), simvq.embedding_proj.bias.double()
        simvq.embedding.weight.copy_(torch.linalg.solve(weight, (codes_KD.double() - bias).T).T)
    projected_KD = simvq.get_codebook_entry(torch.arange(K)).detach()
    assert_nearest(simvq(z_ND.view(5, 21, D)).indices.flatten(), z_ND, projected_KD)


@pytest.mark.parametrize("legacy", [True, False])
def test_loss_and_gradients_are_those_of_the_textbook(legacy: bool) -> None:
    simvq = make_simvq(legacy=legacy, commitment_cost=0.3)
    ours, theirs = (random_z(3, 20, D).requires_grad_() for _ in range(2))
    weight_BND = torch.randn(3, 20, D)

    z_q_BND, loss, _ = simvq(ours)
    ((z_q_BND * weight_BND).sum() + 7 * loss).backward()
    projection = [p.grad.clone() for p in simvq.embedding_proj.parameters()]
    simvq.zero_grad()

    q_BND, textbook_loss = textbook(simvq, theirs)
    straight_through = theirs + (q_BND - theirs).detach()
    ((straight_through * weight_BND).sum() + 7 * textbook_loss).backward()
    torch.testing.assert_close(loss, textbook_loss)
    torch.testing.assert_close(z_q_BND, q_BND)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for found, parameter in zip(projection, simvq.embedding_proj.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_the_two_losses_differ_by_the_side_of_the_commitment_cost() -> None:
    z = 3 + random_z(1, 20, D)
    legacy, standard = (make_simvq(legacy=flag)(z).vq_loss for flag in (True, False))
    torch.testing.assert_close(legacy, standard)  # the same value, but other gradients
    for flag, factor in ((True, 1.0), (False, 0.25)):
        z = (3 + random_z(1, 20, D)).requires_grad_()
        z_q, loss, _ = make_simvq(legacy=flag)(z)
        loss.backward()
        torch.testing.assert_close(z.grad, factor * 2 * (z - z_q).detach() / z.numel())


def test_straight_through_is_the_code_and_passes_the_gradient_to_z_alone() -> None:
    simvq, z = make_simvq(), (100 + random_z(2, 9, D)).requires_grad_()
    z_q, _, indices = simvq(z)
    assert torch.equal(z_q, simvq.get_codebook_entry(indices))
    weight = torch.randn_like(z_q)
    (z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert all(parameter.grad is None for parameter in simvq.parameters())


def test_the_code_before_the_straight_through_step_trains_the_projection() -> None:
    simvq = make_simvq()
    quantized = simvq.quantize(random_z(2, 9, D))
    assert torch.equal(quantized.code_BND, quantized.z_q_BND)
    quantized.code_BND.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in simvq.embedding_proj.parameters())


def test_the_codebook_is_unchanged_by_training_and_the_projection_is_not() -> None:
    simvq = make_simvq()
    before = {name: value.clone() for name, value in simvq.state_dict().items()}
    optimizer = torch.optim.AdamW(simvq.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        simvq(random_z(2, 9, D)).vq_loss.backward()
        optimizer.step()
    unchanged = {n for n, value in simvq.state_dict().items() if torch.equal(value, before[n])}
    assert unchanged == {"embedding.weight"}


def test_images_and_token_rows_are_quantised_alike() -> None:
    simvq, z = make_simvq(), random_z(2, D, 3, 5)
    image, tokens = simvq(z), simvq(z.flatten(2).transpose(1, 2))
    assert image.z_q.shape == z.shape and image.indices.shape == (2, 3, 5)
    assert torch.equal(image.z_q.flatten(2).transpose(1, 2), tokens.z_q)
    assert torch.equal(image.indices.flatten(1), tokens.indices)
    assert torch.equal(image.vq_loss, tokens.vq_loss)
    entries = simvq.get_codebook_entry(image.indices)
    assert torch.equal(entries, image.z_q.permute(0, 2, 3, 1))


@pytest.mark.parametrize("shape", [(2, 9), (2, D + 1, 3, 3), (2, 9, D + 1), (2, 3, 3, D)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\({', '.join(map(str, shape))}\)"):
        make_simvq()(torch.zeros(shape))


@pytest.mark.parametrize("index", [-1, K])
def test_an_index_outside_the_codebook_is_named(index: int) -> None:
    with pytest.raises(ValueError, match=rf"index {index} .* 0 to {K - 1}"):
        make_simvq().get_codebook_entry(torch.tensor([[0, index]]))


def test_usage_counts_codes_until_the_reset() -> None:
    simvq = make_simvq()
    codes_KD = simvq.get_codebook_entry(torch.arange(K)).detach()
    assert simvq.get_codebook_usage() == 0
    simvq(codes_KD[None, :10])
    simvq(codes_KD[None, 5:20])
    assert simvq.code_counts.tolist() == 5 * [1] + 5 * [2] + 10 * [1] + 30 * [0]
    assert simvq.get_codebook_usage() == 20 / K
    simvq.reset_codebook_usage()
    assert simvq.get_codebook_usage() == 0


def test_names_are_those_of_the_reference_implementation() -> None:
    names = ["embedding.weight", "embedding_proj.weight", "embedding_proj.bias"]
    assert list(make_simvq().state_dict()) == names


def test_the_codebook_is_drawn_with_the_scale_of_the_reference() -> None:
    weight = SimVQ(2000, 64).embedding.weight
    assert weight.mean().item() == pytest.approx(0, abs=0.005)
    assert weight.std().item() == pytest.approx(64**-0.5, rel=0.02)


def test_the_search_can_be_replaced() -> None:
    simvq = make_simvq(search=lambda z_ND, codes_KD: torch.full((len(z_ND),), len(codes_KD) - 1))
    assert (simvq(random_z(2, 9, D)).indices == K - 1).all()


def test_bfloat16_parameters() -> None:
    simvq = make_simvq().bfloat16()
    z = random_z(2, 9, D).bfloat16().requires_grad_()
    z_q, loss, indices = simvq(z)
    assert z_q.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(z_q, simvq.get_codebook_entry(indices))
    F.mse_loss(z_q, torch.zeros_like(z_q)).add(loss).backward()
    assert z.grad.isfinite().all() and simvq.embedding_proj.weight.grad.abs().sum() > 0


def test_autocast_trains_the_projection_as_fp32_does() -> None:
    simvq, gradients = make_simvq(), []
    for enabled in (False, True):
        simvq.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = simvq(3 * random_z(2, 50, D)).vq_loss
        loss.backward()
        gradients.append(simvq.embedding_proj.weight.grad.clone())
    assert F.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.99
