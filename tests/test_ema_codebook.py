"""The codebook of moving averages: against its library, the textbook, and over two real ranks."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import run_ranks
from tests.test_nearest_code import LargestTensor, assert_nearest, make_inputs
from vqrae_ds.models.ema_codebook import EMACodebook

K, D, DECAY = 50, 12, 0.9


def make_codebook(**options: object) -> EMACodebook:
    torch.manual_seed(0)
    return EMACodebook(K, D, **{"decay": DECAY, **options})


def random_z(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(codebook: EMACodebook) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in codebook.state_dict().items()}


def is_unchanged(codebook: EMACodebook, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_equals_the_forward_of_the_library(mode: str) -> None:
    """Indices, values, losses, gradients, and what is learned, step after step."""
    ours = make_codebook(commitment_cost=0.3).train(mode == "train")
    theirs = copy.deepcopy(ours.vq)
    for step in range(5):
        our_z, their_z = (random_z(2, 40, D, seed=step).requires_grad_() for _ in range(2))
        weight_BND = random_z(2, 40, D, seed=9)
        z_q_BND, loss, indices_BN = ours(our_z)
        their_z_q_BND, their_indices_BN, their_loss = theirs(their_z)
        assert torch.equal(indices_BN, their_indices_BN)
        torch.testing.assert_close(z_q_BND, their_z_q_BND)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.vq.state_dict()[name], value)
        if mode == "train":  # in evaluation it has neither loss nor gradient
            torch.testing.assert_close(loss, their_loss)
            ((z_q_BND * weight_BND).sum() + 7 * loss).backward()
            ((their_z_q_BND * weight_BND).sum() + 7 * their_loss).backward()
            torch.testing.assert_close(our_z.grad, their_z.grad)


@pytest.mark.parametrize("kind", ["random", "clustered", "shared offset"])
def test_indices_are_those_of_a_float64_search(kind: str) -> None:
    z_ND, codes_KD = make_inputs(kind, 105, K, D)
    codebook = make_codebook()
    codebook.vq.codebook = codes_KD
    assert_nearest(codebook(z_ND.view(5, 21, D)).indices.flatten(), z_ND, codes_KD)


def test_what_is_learned_is_that_of_the_textbook() -> None:
    codebook, z_BND = make_codebook(), random_z(2, 40, D)
    size_K, sum_KD = torch.ones(K).double(), codebook.vq.codebook.double()
    for _ in range(3):
        indices_N = codebook(z_BND).indices.flatten()
        assigned_NK = F.one_hot(indices_N, K).double()
        size_K = DECAY * size_K + (1 - DECAY) * assigned_NK.sum(0)
        sum_KD = DECAY * sum_KD + (1 - DECAY) * assigned_NK.T @ z_BND.flatten(0, 1).double()
        smoothed_K = (size_K + 1e-5) / (size_K.sum() + K * 1e-5) * size_K.sum()
        codes_KD = sum_KD / smoothed_K[:, None]
        torch.testing.assert_close(codebook.vq.codebook.double(), codes_KD, atol=1e-6, rtol=1e-5)


class TestWhenItLearns:
    def test_in_training_alone(self) -> None:
        codebook, z_BND = make_codebook().eval(), random_z(2, 9, D)
        before = state_of(codebook)
        codebook(z_BND)
        codebook.quantize(z_BND.requires_grad_())
        assert is_unchanged(codebook, before)
        codebook.train().quantize(z_BND)
        assert not is_unchanged(codebook, before)

    def test_looking_up_teaches_nothing(self) -> None:
        codebook = make_codebook().train()
        before = state_of(codebook)
        codebook.get_codebook_entry(codebook.find_codes(random_z(2, 9, D)))
        codebook.get_codebook_statistics()
        codebook.reset_codebook_usage()
        assert is_unchanged(codebook, before)

    def test_tokens_are_quantised_before(self) -> None:
        codebook, z_BND = make_codebook().train(), random_z(2, 9, D)
        codes_KD = codebook.vq.codebook.clone()
        quantized = codebook.quantize(z_BND)
        assert torch.equal(quantized.z_q_BND, codes_KD[quantized.indices_BN])
        assert torch.equal(quantized.code_BND, quantized.z_q_BND)
        loss = 0.25 * F.mse_loss(z_BND, codes_KD[quantized.indices_BN])
        torch.testing.assert_close(quantized.vq_loss, loss)

    def test_by_itself_and_not_from_gradients(self) -> None:
        codebook = make_codebook()
        assert not list(codebook.parameters())
        assert not codebook.quantize(random_z(2, 9, D)).code_BND.requires_grad


class TestPrecision:
    def test_bfloat16_tokens_meet_fp32_codes(self) -> None:
        rounded, z_BND = make_codebook(), random_z(2, 40, D).bfloat16()
        whole = copy.deepcopy(rounded)
        quantized, expected = rounded.quantize(z_BND), whole.quantize(z_BND.float())
        assert torch.equal(quantized.indices_BN, expected.indices_BN)
        assert torch.equal(quantized.vq_loss, expected.vq_loss)
        assert torch.equal(quantized.z_q_BND, expected.z_q_BND.bfloat16())
        assert is_unchanged(rounded, state_of(whole))
        assert all(b.dtype == torch.float32 for b in rounded.buffers() if b.is_floating_point())

    def test_autocast_changes_nothing(self) -> None:
        mixed, z_BND = make_codebook(), random_z(2, 40, D)
        whole = copy.deepcopy(mixed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            quantized = mixed.quantize(z_BND)
        for found, expected in zip(quantized, whole.quantize(z_BND), strict=True):
            assert torch.equal(found, expected)
        assert is_unchanged(mixed, state_of(whole))


def test_no_tensor_has_tokens_x_codes_x_dimensions() -> None:
    codebook, z_BND = EMACodebook(200, 32).eval(), random_z(3, 100, 32)
    with torch.no_grad(), LargestTensor() as largest:
        codebook.get_codebook_entry(codebook.find_codes(z_BND))
        codebook(z_BND)
    assert largest.numel <= 300 * 256, "tokens x codes, padded: the tile of the search"


def test_without_the_library_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match="pip install"):
        make_codebook()


def learn(rank: int, folder: Path) -> None:
    from vector_quantize_pytorch.vector_quantize_pytorch import is_distributed

    with mock.patch("torch.distributed.is_initialized", return_value=False):
        assert not is_distributed(), "as if it was first asked before there was a group"
        early = make_codebook()
    assert not is_distributed(), "which the library keeps"
    with pytest.raises(ValueError, match="before the process group"):
        early.quantize(random_z(1, 1, D))
    codebook = make_codebook()
    for step in range(5):
        codebook.quantize(random_z(2, 30, D, seed=10 * step + rank))
    torch.save((codebook.state_dict(), codebook.code_counts), folder / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_ranks_learn_one_codebook_from_the_tokens_of_both(tmp_path: Path) -> None:
    run_ranks(2, learn, tmp_path)
    (state, counts_K), (other_state, other_counts_K) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())
    codebook = make_codebook()
    for step in range(5):
        codebook.quantize(torch.cat([random_z(2, 30, D, seed=10 * step + r) for r in range(2)]))
    for name, value in codebook.state_dict().items():
        torch.testing.assert_close(state[name], value)
    assert torch.equal(counts_K + other_counts_K, codebook.code_counts)
