"""When SimVQ projects its codes: at each call, or after a promise once, until they are forgotten.

Real engines keep the promise in tests/integration/test_kept_codes.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import build_model, random_images
from vqrae_ds import VQRAE, SimVQ
from vqrae_ds.ops.nearest_code import code_norms

K, D = 50, 12


def make_simvq(*, keeps: bool) -> SimVQ:
    torch.manual_seed(0)
    simvq = SimVQ(K, D)
    if keeps:
        simvq.keep_codes()
    return simvq


def projections(simvq: SimVQ) -> list[int]:
    """Appended to: the rows of each call of the projection."""
    rows: list[int] = []
    simvq.embedding_proj.register_forward_hook(lambda _, __, out: rows.append(out.shape[0]))
    return rows


def fresh_codes(simvq: SimVQ) -> Tensor:
    projection = simvq.embedding_proj
    return F.linear(simvq.embedding.weight, projection.weight, projection.bias).detach()


def assert_up_to_date(simvq: SimVQ) -> None:
    codes_KD, norms = simvq.searched_codes()
    assert torch.equal(codes_KD, fresh_codes(simvq))
    for found, expected in zip(norms, code_norms(codes_KD), strict=True):
        assert torch.equal(found, expected)
    z_BND = fresh_codes(simvq)[None] + 1e-4
    assert torch.equal(simvq.find_codes(z_BND), torch.arange(K)[None])


def change(simvq: SimVQ) -> None:
    """In place and in silence, as ZeRO-3 does: no counter of the tensor moves."""
    version = simvq.embedding_proj.weight._version
    simvq.embedding_proj.weight.data.normal_()
    assert simvq.embedding_proj.weight._version == version


def test_left_to_itself_it_follows_any_change_of_weights() -> None:
    simvq = make_simvq(keeps=False)
    optimizer = torch.optim.SGD(simvq.parameters(), lr=1.0)
    for train in (True, False, True):
        simvq.train(train)
        assert_up_to_date(simvq)
        before_KD = fresh_codes(simvq)
        simvq(torch.ones(1, 3, D)).vq_loss.backward()
        optimizer.step()
        assert not torch.equal(fresh_codes(simvq), before_KD)
        assert_up_to_date(simvq)
        change(simvq)
        assert_up_to_date(simvq)


def test_after_a_promise_codes_are_projected_once() -> None:
    simvq, z_BND = make_simvq(keeps=True), torch.randn(2, 9, D)
    rows = projections(simvq)
    expected = make_simvq(keeps=False).quantize(z_BND)
    for mode in (True, True, False):
        simvq.train(mode)
        for found, other in zip(simvq.quantize(z_BND), expected, strict=True):
            assert torch.equal(found, other)
    chosen = len(z_BND)  # of (B, N, D)
    assert rows == [K, chosen, 0, chosen, 0, chosen], "the layer runs as often in each pass"


def test_a_promise_that_is_broken_shows() -> None:
    """Else the tests of what forgets the codes would say nothing."""
    simvq = make_simvq(keeps=True)
    assert_up_to_date(simvq)
    change(simvq)
    with pytest.raises(AssertionError):
        assert_up_to_date(simvq)
    simvq.forget_codes()
    assert_up_to_date(simvq)


def load(simvq: SimVQ) -> None:
    torch.manual_seed(7)
    simvq.load_state_dict(SimVQ(K, D).state_dict())


def load_the_whole(simvq: SimVQ) -> None:
    torch.manual_seed(7)
    whole = torch.nn.ModuleDict({"quantizer": simvq})
    whole.load_state_dict(torch.nn.ModuleDict({"quantizer": SimVQ(K, D)}).state_dict())


@pytest.mark.parametrize("change_weights", [load, load_the_whole, SimVQ.double])
def test_what_forgets_them_by_itself(change_weights: Callable[[SimVQ], object]) -> None:
    simvq = make_simvq(keeps=True)
    before_KD = simvq.searched_codes().codes_KD
    change_weights(simvq)
    codes_KD = simvq.searched_codes().codes_KD
    assert torch.equal(codes_KD, fresh_codes(simvq))
    assert codes_KD.dtype != before_KD.dtype or not torch.equal(codes_KD, before_KD)
    rows = projections(simvq)
    simvq.searched_codes()
    assert rows == [0], "the promise holds on"


def test_a_copy_has_made_no_promise() -> None:
    simvq = make_simvq(keeps=True)
    simvq.searched_codes()
    other = copy.deepcopy(simvq)
    change(other)
    assert_up_to_date(other)
    change(other)
    assert_up_to_date(other)
    assert_up_to_date(simvq)


def test_kept_codes_are_no_state() -> None:
    simvq = make_simvq(keeps=True)
    names = list(simvq.state_dict())
    simvq.searched_codes()
    assert list(simvq.state_dict()) == names
    assert not simvq.searched_codes().codes_KD.requires_grad


def test_a_loaded_model_keeps_nothing(tmp_path) -> None:
    build_model().save_pretrained(tmp_path)
    model, images = VQRAE.from_pretrained(tmp_path), random_images()
    rows = projections(model.quantizer)
    first = model.encode_to_indices(images)
    assert torch.equal(model.encode_to_indices(images), first)
    assert rows == 2 * [model.config.num_embeddings]
