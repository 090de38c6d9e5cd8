"""What the benchmarks count: collectives, and waits for the device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vqrae_ds.benchmarks.counting import counted, extra

CPU = torch.device("cpu")
X = torch.tensor([1.0, -2.0, 3.0])
ONE = torch.tensor(1.0)

COLLECTIVES = {
    "all_reduce": lambda: dist.all_reduce(X.clone()),
    "reduce": lambda: dist.reduce(X.clone(), 0),
    "broadcast": lambda: dist.broadcast(X.clone(), 0),
    "all_gather": lambda: dist.all_gather([X.clone()], X),
    "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(X.clone(), X),
    "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(X.clone(), X.clone()),
    "all_to_all_single": lambda: dist.all_to_all_single(X.clone(), X),
    "barrier": dist.barrier,
    "asynchronous": lambda: dist.all_reduce(X.clone(), async_op=True).wait(),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_each_collective_is_counted_once_and_is_no_wait(one_rank, name):
    with counted("cpu") as counts:
        COLLECTIVES[name]()
    assert counts.collectives.total() == 1
    assert counts.waits.total() == 0
    (call,) = counts.collectives
    assert call.place.startswith("test_counting.py:")


@pytest.mark.parametrize("name", ["all_gather_object", "broadcast_object_list"])
def test_collectives_of_objects_are_counted(one_rank, name):
    with counted("cpu") as counts:
        if name == "all_gather_object":
            dist.all_gather_object([None], "mine")
        else:
            dist.broadcast_object_list(["mine"])
    assert counts.collectives.total() == 2, "the length and the bytes"


def test_collectives_of_a_backward_pass_are_counted(one_rank):
    weight = X.clone().requires_grad_()
    weight.register_hook(lambda grad: dist.all_reduce(grad.clone()) and None)
    with counted("cpu") as counts:
        weight.square().sum().backward()
    assert counts.collectives.total() == 1


WAITS = {
    "item": lambda: ONE.item(),
    "bool": lambda: bool(ONE > 0),
    "float": lambda: float(ONE),
    "int": lambda: int(ONE),
    "comparison": lambda: 1 if ONE > 0 else 0,
    "isfinite": lambda: bool(X.isfinite().all()),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "tolist": lambda: X.tolist(),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 0],
    "masked_select": lambda: X.masked_select(X > 0),
    "unique": lambda: X.unique(),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_counted(name):
    with counted("cpu") as counts:
        WAITS[name]()
    assert counts.waits.total() >= 1
    assert all(call.place.startswith("test_counting.py:") for call in counts.waits)


class Event(torch.cuda.Event):
    """One of CUDA's, that was recorded nowhere, and says of itself whether it is done."""

    def __init__(self, is_done: bool) -> None:
        self.is_done = is_done

    def query(self) -> bool:
        return self.is_done


@pytest.mark.skipif(torch.cuda.is_available(), reason="an event of CUDA is asked itself there")
def test_an_event_is_waited_for_only_if_it_is_not_done():
    synchronize = torch.cuda.Event.synchronize
    for is_done, expected in ((False, 1), (True, 0)):
        event = Event(is_done)
        with counted("cpu") as counts:
            event.synchronize()
        assert counts.waits.total() == expected
        assert all(call.place.startswith("test_counting.py:") for call in counts.waits)
    assert torch.cuda.Event.synchronize is synchronize


def test_waiting_for_the_device_is_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)  # there may be no GPU
    with counted("cpu") as counts:
        torch.cuda.synchronize()
        torch.cuda.synchronize(CPU)
    assert counts.waits.total() == 2


def test_a_plain_training_step_neither_waits_nor_communicates():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    with counted("cpu") as counts:
        layer(X)[torch.tensor([0])].square().sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    assert (counts.collectives.total(), counts.waits.total()) == (0, 0)


def test_nothing_is_counted_after_leaving(one_rank):
    with counted("cpu") as counts:
        pass
    dist.all_reduce(X.clone())
    ONE.item()
    X.tolist()
    assert (counts.collectives.total(), counts.waits.total()) == (0, 0)


def test_fewer_calls_of_one_operator_do_not_hide_more_of_another(one_rank):
    with counted("cpu") as ours:
        dist.all_reduce(X.clone())
        dist.all_reduce(X.clone())
    with counted("cpu") as peer:
        dist.all_reduce(X.clone())
        dist.broadcast(X.clone(), 0)
    assert extra(ours.collectives, peer.collectives) == 1
    assert extra(peer.collectives, ours.collectives) == 1
