"""SimVQ: the facts that define it, against the textbook formula, and against another library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vector_quantize_pytorch import SimVQ as TheirSimVQ

from tests.test_nearest_code import assert_nearest, make_inputs
from vqrae_ds import SimVQ
from vqrae_ds.ops import nearest_code

K, D = 50, 12


EVERY_PROJECTION = [
    {},
    {"bias": False},
    {"projection_init": "identity"},
    {"projection_init": "orthogonal"},
    {"projection_init": "orthogonal", "bias": False},
]


def make_simvq(**options: object) -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(K, D, **options)


def bias_of(simvq: SimVQ) -> Tensor:
    bias = simvq.embedding_proj.bias
    return torch.zeros(simvq.embedding_dim) if bias is None else bias


def random_z(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def textbook(simvq: SimVQ, z_BND: Tensor) -> tuple[Tensor, Tensor]:
    """The code of each token out of the whole projected codebook, and the loss of the paper."""
    codes_KD = simvq.embedding.weight @ simvq.embedding_proj.weight.T + bias_of(simvq)
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


@pytest.mark.parametrize("options", EVERY_PROJECTION, ids=str)
@pytest.mark.parametrize("kind", ["random", "clustered", "shared offset"])
@pytest.mark.parametrize("tile", [4096, 11])
def test_indices_are_those_of_a_float64_search(
    monkeypatch: pytest.MonkeyPatch, kind: str, tile: int, options: dict[str, object]
) -> None:
    monkeypatch.setattr(nearest_code, "TILE_TOKENS", tile)
    monkeypatch.setattr(nearest_code, "TILE_CODES", tile)
    z_ND, codes_KD = make_inputs(kind, 105, K, D)
    simvq = make_simvq(**options)
    with torch.no_grad():  # through whatever projection, the codes are those of the inputs
        weight, bias = simvq.embedding_proj.weight.double(), bias_of(simvq).double()
        simvq.embedding.weight.copy_(torch.linalg.solve(weight, (codes_KD.double() - bias).T).T)
    projected_KD = simvq.get_codebook_entry(torch.arange(K)).detach()
    assert_nearest(simvq(z_ND.view(5, 21, D)).indices.flatten(), z_ND, projected_KD)


@pytest.mark.parametrize("options", EVERY_PROJECTION, ids=str)
@pytest.mark.parametrize("legacy", [True, False])
def test_loss_and_gradients_are_those_of_the_textbook(
    legacy: bool, options: dict[str, object]
) -> None:
    simvq = make_simvq(legacy=legacy, commitment_cost=0.3, **options)
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


def test_a_code_is_projected_for_the_search_alone() -> None:
    simvq, z_BND, flops = make_simvq(), random_z(2, 9, D), []
    for find in (simvq.find_codes, simvq.quantize):
        with FlopCounterMode(display=False) as counter:
            find(z_BND)
        flops.append(counter.get_total_flops())
    assert flops[1] == flops[0] >= 2 * K * D * D


@pytest.mark.parametrize("options", EVERY_PROJECTION, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_the_code_of_a_search_has_the_gradient_of_one_that_is_projected(
    dtype: torch.dtype, is_mixed: bool, options: dict[str, object]
) -> None:
    simvq, weight_BND, found = make_simvq(**options).to(dtype), random_z(3, 20, D), []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
        searched = simvq.quantize(random_z(3, 20, D))
        projected_BND = simvq.codes_at(searched.indices_BN)
    for code_BND in (searched.code_BND, projected_BND):
        (code_BND * weight_BND).sum().backward()
        found.append([code_BND, *(p.grad.clone() for p in simvq.embedding_proj.parameters())])
        simvq.zero_grad()
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_codebook_is_unchanged_by_training_and_the_projection_is_not() -> None:
    simvq = make_simvq()
    before = {name: value.clone() for name, value in simvq.state_dict().items()}
    optimizer = torch.optim.AdamW(simvq.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        simvq(random_z(2, 9, D)).vq_loss.backward()
        optimizer.step()
    unchanged = {n for n, value in simvq.state_dict().items() if torch.equal(value, before[n])}
    assert unchanged == {"embedding.weight"}


def test_names_are_those_of_the_reference_implementation() -> None:
    names = ["embedding.weight", "embedding_proj.weight", "embedding_proj.bias"]
    assert list(make_simvq().state_dict()) == names


def test_the_codebook_is_drawn_with_the_scale_of_the_reference() -> None:
    weight = SimVQ(2000, 64).embedding.weight
    assert weight.mean().item() == pytest.approx(0, abs=0.005)
    assert weight.std().item() == pytest.approx(64**-0.5, rel=0.02)


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


class TestPrecision:
    """Distances are fp32: neighbouring codes differ in fewer bits than bf16 keeps."""

    @staticmethod
    def near_ties(codes_KD: Tensor) -> Tensor:
        """Tokens (K * 8, D) beside the points halfway between two codes that lie close together."""
        nearest_K = torch.cdist(codes_KD, codes_KD).fill_diagonal_(torch.inf).argmin(1)
        share_8 = 0.5 + torch.tensor([-1, -3e-1, -1e-1, -1e-2, 1e-2, 1e-1, 3e-1, 1]) * 1e-2
        z_8KD = torch.lerp(codes_KD, codes_KD[nearest_K], share_8[:, None, None])
        return z_8KD.flatten(0, 1)

    def test_bfloat16_weights(self) -> None:
        simvq = make_simvq().bfloat16()
        codes_KD = simvq.get_codebook_entry(torch.arange(K)).detach()
        assert codes_KD.dtype == torch.bfloat16
        z_ND = self.near_ties(codes_KD.float())
        assert_nearest(simvq(z_ND[None]).indices[0], z_ND, codes_KD)
        rounded_ND = z_ND.bfloat16()
        assert_nearest(simvq(rounded_ND[None]).indices[0], rounded_ND, codes_KD)

    def test_autocast(self) -> None:
        simvq = make_simvq()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            codes_KD = simvq.get_codebook_entry(torch.arange(K)).detach()
            z_ND = self.near_ties(codes_KD.float())
            indices_N = simvq(z_ND[None]).indices[0]
        assert codes_KD.dtype == torch.bfloat16
        assert_nearest(indices_N, z_ND, codes_KD)

    def test_these_ties_are_lost_in_bfloat16(self) -> None:
        """Else the two tests above would prove nothing."""
        codes_KD = make_simvq().bfloat16().get_codebook_entry(torch.arange(K)).detach()
        z_ND = self.near_ties(codes_KD.float())
        indices_N = torch.cdist(z_ND.bfloat16().float(), codes_KD.float()).bfloat16().argmin(1)
        with pytest.raises(AssertionError, match="provably"):
            assert_nearest(indices_N, z_ND, codes_KD)


class TestProjection:
    def test_linear_is_the_default_of_torch(self) -> None:
        projection = make_simvq().embedding_proj
        torch.manual_seed(1)
        projection.reset_parameters()
        torch.manual_seed(1)
        expected = nn.Linear(D, D)
        assert torch.equal(projection.weight, expected.weight)
        assert torch.equal(projection.bias, expected.bias)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("init", ["identity", "orthogonal"])
    def test_the_others_keep_distances(self, init: str, dtype: torch.dtype) -> None:
        """They are drawn by the module itself, in the dtype it has under ZeRO-3."""
        simvq = make_simvq(projection_init=init).to(dtype)
        for parameter in simvq.embedding_proj.parameters():
            nn.init.constant_(parameter, 7)
        simvq.embedding_proj.reset_parameters()
        weight, bias = simvq.embedding_proj.weight.float(), simvq.embedding_proj.bias
        tolerance = {"atol": 1e-5 if dtype == torch.float32 else 0.02, "rtol": 0}
        torch.testing.assert_close(weight @ weight.T, torch.eye(D), **tolerance)
        assert not bias.any() and bias.requires_grad
        assert torch.equal(weight, torch.eye(D)) == (init == "identity")

    def test_without_a_bias_none_is_stored(self) -> None:
        names = ["embedding.weight", "embedding_proj.weight"]
        assert list(make_simvq(bias=False).state_dict()) == names

    def test_an_unknown_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'eye' .* linear, identity, orthogonal"):
            make_simvq(projection_init="eye")


@pytest.mark.parametrize("shape", [(4, 30, D), (2, D, 5, 6)])
def test_equals_the_class_of_vector_quantize_pytorch(shape: tuple[int, ...]) -> None:
    """Its projection has no bias, and its loss has beta on the side of the tokens."""
    ours, theirs = make_simvq(bias=False, legacy=False), TheirSimVQ(D, K, rotation_trick=False)
    theirs.channel_first = len(shape) == 4
    theirs.frozen_codebook.copy_(ours.embedding.weight)
    theirs.code_transform.load_state_dict(ours.embedding_proj.state_dict())
    our_z, their_z = (random_z(*shape).requires_grad_() for _ in range(2))
    weight = torch.randn(shape)

    z_q, loss, indices = ours(our_z)
    their_z_q, their_indices, their_loss = theirs(their_z)
    for value, total in ((z_q, loss), (their_z_q, their_loss)):
        ((value * weight).sum() + 7 * total).backward()
    assert torch.equal(indices, their_indices)
    torch.testing.assert_close(z_q, their_z_q)
    torch.testing.assert_close(loss, their_loss)
    torch.testing.assert_close(our_z.grad, their_z.grad)
    torch.testing.assert_close(ours.embedding_proj.weight.grad, theirs.code_transform.weight.grad)
    torch.testing.assert_close(
        ours.get_codebook_entry(indices.flatten()), theirs.codebook[indices.flatten()]
    )
