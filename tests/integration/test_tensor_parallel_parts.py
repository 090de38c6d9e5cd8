"""SimVQ and the decoder over a tensor-parallel group of three ranks against one process.

K = 1000 codes and 64 hidden units do not divide by three; the three heads do.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.test_code_distances import permuted_codes
from vqrae_ds.config import DecoderConfig
from vqrae_ds.models.decoder import Decoder
from vqrae_ds.models.simvq import SimVQ
from vqrae_ds.ops.code_distances import pair_distances
from vqrae_ds.ops.nearest_code import code_norms, nearest_code
from vqrae_ds.parallel.codebook import ShardedCodebook
from vqrae_ds.parallel.groups import make_groups
from vqrae_ds.parallel.marks import is_split
from vqrae_ds.parallel.model import sliced_parts
from vqrae_ds.parallel.slices import own_slice, split_of

pytestmark = pytest.mark.slow

RANKS, NUM_CODES, DIM = 3, 1000, 24
TIES = ((400, 5), (999, 5), (700, 333), (334, 333), (998, 668))  # a code, and its lower twin
DECODER = DecoderConfig(
    hidden_size=48,
    num_layers=2,
    num_heads=3,
    intermediate_size=64,
    norm_type="rms_norm",
    use_qk_norm=True,
    layer_scale_init_value=0.5,
)


def test_three_ranks_equal_one():
    run_ranks(RANKS, check_all)


def check_all(rank: int) -> None:
    groups = make_groups(RANKS, timedelta(seconds=60))
    parts = sliced_parts(NUM_CODES, groups, nearest_code)
    check_simvq(parts, use_ties=False)
    check_simvq(parts, use_ties=True)
    check_that_the_first_of_equals_wins(parts)
    check_tokens_that_are_not_finite(parts)
    check_decoder(parts)


def check_simvq(parts: dict, *, use_ties: bool) -> None:
    whole, ours = make_simvq(), make_simvq(search=parts["search"], codebook=parts["codebook"])
    place = make_groups(RANKS, timedelta(seconds=60)).place
    assert isinstance(ours.embedding, ShardedCodebook)
    if use_ties:
        plant_ties(whole)
        shard = own_slice(whole.embedding.weight, split_of("quantizer.embedding.weight"), place)
        ours.embedding.weight.data.copy_(shard)
    z_BND = torch.randn(2, 300, DIM, generator=torch.Generator().manual_seed(1))
    if use_ties:  # tokens that lie on the codes there are two of
        codes = whole.get_codebook_entry(torch.tensor([low for _, low in TIES])).detach()
        z_BND[0, : len(TIES)] = codes
        z_BND[1, : len(TIES)] = codes + 1e-3
    results = []
    for simvq in (whole, ours):
        z = z_BND.clone().requires_grad_()
        out = simvq.quantize(z)
        target = torch.linspace(-1, 1, DIM)
        loss = out.vq_loss + (out.z_q_BND * target).sum() + out.code_BND.square().mean()
        loss.backward()
        results.append((out, z.grad, simvq.embedding_proj.weight.grad, simvq.embedding_proj.bias))
    (theirs, *their_grads), (mine, *my_grads) = results
    assert torch.equal(mine.indices_BN, theirs.indices_BN)
    if use_ties:
        low = torch.tensor([low for _, low in TIES])
        assert torch.equal(mine.indices_BN[0, : len(TIES)], low)
        assert torch.equal(mine.indices_BN[1, : len(TIES)], low)
    assert len(mine.indices_BN.unique()) > 100, "all shards must take part"
    assert torch.equal(mine.z_q_BND, theirs.z_q_BND)
    assert torch.equal(mine.vq_loss, theirs.vq_loss)
    assert torch.equal(my_grads[0], their_grads[0])
    assert torch.equal(my_grads[1], their_grads[1])
    assert torch.equal(my_grads[2].grad, their_grads[2].grad)
    entries = torch.arange(NUM_CODES)
    assert torch.equal(ours.get_codebook_entry(entries), whole.get_codebook_entry(entries))
    assert ours.get_codebook_usage() == whole.get_codebook_usage()


def check_that_the_first_of_equals_wins(parts: dict) -> None:
    """Where sums in another order make that of another rank the smaller one."""
    whole_KD = permuted_codes(NUM_CODES)
    z_ND, every_K = torch.zeros(1, whole_KD.shape[1]), torch.arange(NUM_CODES)
    distances_K = pair_distances(z_ND, whole_KD, torch.zeros_like(every_K), every_K)
    place = make_groups(RANKS, timedelta(seconds=60)).place
    whole_KD = whole_KD.roll(NUM_CODES // 2 - int(distances_K.argmin()), 0)  # to the second rank
    codes_KD = own_slice(whole_KD, split_of("quantizer.embedding.weight"), place).contiguous()
    assert parts["search"](z_ND, codes_KD, code_norms(codes_KD)).tolist() == [0]


def check_tokens_that_are_not_finite(parts: dict) -> None:
    """Training goes on with them: all ranks find the same code, whichever, of the codebook."""
    simvq = make_simvq(search=parts["search"], codebook=parts["codebook"])
    indices = simvq.find_codes(torch.full((1, 4, DIM), torch.nan))
    assert ((indices >= 0) & (indices < NUM_CODES)).all()
    first = indices.clone()
    dist.broadcast(first, 0)
    assert torch.equal(indices, first)


def check_decoder(parts: dict) -> None:
    place = make_groups(RANKS, timedelta(seconds=60)).place
    whole, ours = (make_decoder(**layers) for layers in ({}, {"layers": parts["layers"]}))
    for (name, theirs), mine in zip(whole.named_parameters(), ours.parameters(), strict=True):
        split = split_of(f"decoder.{name}")
        assert is_split(mine) == (split is not None), name
        expected = theirs if split is None else own_slice(theirs, split, place)
        assert torch.equal(mine, expected), f"{name} is drawn as one process would"
    x_BND = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(2))
    inputs = []
    for decoder in (whole, ours):
        x = x_BND.clone().requires_grad_()
        out = decoder(x, 4, 4)
        (out.patches_BhwP.square().sum() + out.hidden_BND.sum()).backward()
        inputs.append((out.patches_BhwP, x.grad))
    for theirs, mine in zip(*inputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for (name, theirs), mine in zip(whole.named_parameters(), ours.parameters(), strict=True):
        split = split_of(f"decoder.{name}")
        expected = theirs.grad if split is None else own_slice(theirs.grad, split, place)
        difference = (mine.grad - expected).norm() / expected.norm()
        assert difference < 1e-5, f"gradient of {name} differs by {difference:.1e}"


def make_simvq(**parts) -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(NUM_CODES, DIM, **parts)


def make_decoder(**parts) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DECODER, 4, 8, **parts)


def plant_ties(simvq: SimVQ) -> None:
    with torch.no_grad():
        for high, low in TIES:
            simvq.embedding.weight[high] = simvq.embedding.weight[low]
