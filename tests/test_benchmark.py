"""What the benchmarks count, compare and print; the loops themselves are timed nowhere here."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.conftest import run_python
from tests.tiny import GAN, PlainEngine, build_model, random_images
from vqrae_ds.benchmarks import bare_loop
from vqrae_ds.benchmarks.counting import counted, extra
from vqrae_ds.benchmarks.step import (
    BLOCK_STEPS,
    COUNTED_STEPS,
    WARM_UP_STEPS,
    Found,
    paired_ratios,
    take_turns,
)
from vqrae_ds.benchmarks.table import Report, Row, as_json, as_text
from vqrae_ds.config import AdversarialConfig, DistillationConfig, LossConfig
from vqrae_ds.losses.objective import Objective
from vqrae_ds.models.discriminator import PatchDiscriminator
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.training_model import TrainingModel

CPU = torch.device("cpu")
X = torch.tensor([1.0, -2.0, 3.0])
ONE = torch.tensor(1.0)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


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
def test_each_collective_is_counted_once_and_is_no_wait(alone, name):
    with counted("cpu") as counts:
        COLLECTIVES[name]()
    assert counts.collectives.total() == 1
    assert counts.waits.total() == 0
    (call,) = counts.collectives
    assert call.place.startswith("test_benchmark.py:")


@pytest.mark.parametrize("name", ["all_gather_object", "broadcast_object_list"])
def test_collectives_of_objects_are_counted(alone, name):
    with counted("cpu") as counts:
        if name == "all_gather_object":
            dist.all_gather_object([None], "mine")
        else:
            dist.broadcast_object_list(["mine"])
    assert counts.collectives.total() == 2, "the length and the bytes"


def test_collectives_of_a_backward_pass_are_counted(alone):
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
    assert all(call.place.startswith("test_benchmark.py:") for call in counts.waits)


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
        assert all(call.place.startswith("test_benchmark.py:") for call in counts.waits)
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


def test_nothing_is_counted_after_leaving(alone):
    with counted("cpu") as counts:
        pass
    dist.all_reduce(X.clone())
    ONE.item()
    X.tolist()
    assert (counts.collectives.total(), counts.waits.total()) == (0, 0)


def test_fewer_calls_of_one_operator_do_not_hide_more_of_another(alone):
    with counted("cpu") as ours:
        dist.all_reduce(X.clone())
        dist.all_reduce(X.clone())
    with counted("cpu") as peer:
        dist.all_reduce(X.clone())
        dist.broadcast(X.clone(), 0)
    assert extra(ours.collectives, peer.collectives) == 1
    assert extra(peer.collectives, ours.collectives) == 1


def take_turns_with(step_of_ours, step_of_bare, pairs: int) -> tuple[Found, str]:
    """What was found, and whose steps came in which order: o for ours, b for bare."""
    order: list[str] = []
    found: list[Found] = []
    batches = itertools.count()

    def bare_steps(number: int) -> None:
        for _ in itertools.islice(batches, number):
            order.append("b")
            step_of_bare()

    for _ in take_turns(batches, bare_steps, pairs, CPU, found):
        order.append("o")
        step_of_ours()
    assert next(batches) == len(order), "each batch was used once"
    return found[0], "".join(order)


def step_of_a_loop():
    dist.all_reduce(X.clone())
    X.square().sum()


def step_of_a_leaky_loop():
    step_of_a_loop()
    dist.all_reduce(X.clone())
    X.sum().item()


def test_what_is_planted_into_a_loop_is_found(alone):
    found, _ = take_turns_with(step_of_a_leaky_loop, step_of_a_loop, pairs=2)
    assert extra(found.ours.collectives, found.bare.collectives) == COUNTED_STEPS
    assert extra(found.ours.waits, found.bare.waits) == COUNTED_STEPS
    clean, _ = take_turns_with(step_of_a_loop, step_of_a_loop, pairs=2)
    assert extra(clean.ours.collectives, clean.bare.collectives) == 0
    assert extra(clean.ours.waits, clean.bare.waits) == 0
    assert clean.ours.collectives.total() == COUNTED_STEPS


def test_the_loops_take_turns(alone):
    found, order = take_turns_with(step_of_a_loop, step_of_a_loop, pairs=3)
    bare, ours = "b" * BLOCK_STEPS, "o" * BLOCK_STEPS
    counting = "b" * COUNTED_STEPS + "o" * COUNTED_STEPS
    assert order == "ob" * WARM_UP_STEPS + counting + (bare + ours) * 3 + bare + "o"
    assert (len(found.ours_blocks), len(found.bare_blocks)) == (3, 4)


def test_paired_ratios_take_out_a_drift():
    drift = [10.0 + i for i in range(9)]  # of a machine that slows down from block to block
    ours = [1.02 * seconds for seconds in drift[1::2]]
    assert paired_ratios(ours, drift[0::2]) == pytest.approx([1.02] * 4)


class SteppedEngine(PlainEngine):
    """Collects gradients: the step is taken by nobody."""

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same_gradients(ours: dict, bare: dict) -> None:
    assert ours.keys() == bare.keys() and ours
    for name, grad in ours.items():
        torch.testing.assert_close(bare[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_bare_loop_of_stage_1_trains_the_same():
    torch.manual_seed(2)
    discriminator = SteppedEngine(PatchDiscriminator(**GAN))
    generator = SteppedEngine(TrainingModel(build_model()))
    config = LossConfig(perceptual=None, adversarial=AdversarialConfig(weight=1.0, **GAN))
    objective = Objective(config, None, None, discriminator.module, lambda alone: alone)
    images = random_images()
    loss = objective.generator(generator(images), images, 0)
    loss.surrogate.backward()
    verdict = objective.discriminator_loss(discriminator, images, loss.images_hat_B3HW, 0)
    verdict.total.backward()
    ours = gradients(generator), gradients(discriminator)
    bare_loop.gan_step(generator, discriminator, images)
    assert_same_gradients(ours[0], gradients(generator))
    assert_same_gradients(ours[1], gradients(discriminator))


def test_the_bare_loop_of_stage_2_trains_the_same():
    vqrae = build_model(freeze_encoder=False)
    teacher = build_encoder(vqrae.config, "sdpa")  # another one, or its term would be 0
    generator = SteppedEngine(TrainingModel(vqrae, teacher))
    config = LossConfig(perceptual=None, distillation=DistillationConfig())
    objective = Objective(config, None, None, None, lambda alone: alone)
    images = random_images()
    objective.generator(generator(images), images, 0).surrogate.backward()
    ours = gradients(generator)
    bare_loop.distillation_step(generator, images)
    assert_same_gradients(ours, gradients(generator))


ROWS = (
    Row("overhead", 51.0, 50.0, "bare DeepSpeed loop", "ms a step"),
    Row("extra_syncs", 0.0, 0, "allowed", "a step"),
)


def test_a_report_as_json_has_the_ratios():
    report = json.loads(as_json(Report("step", "a machine", ROWS, {"stage2": {"pairs": 2}})))
    assert (report["name"], report["machine"]) == ("step", "a machine")
    assert report["rows"][0] == {
        "metric": "overhead",
        "ours": 51.0,
        "peer": 50.0,
        "peer_name": "bare DeepSpeed loop",
        "unit": "ms a step",
        "ratio": pytest.approx(1.02),
    }
    assert report["rows"][1]["ratio"] is None, "there is no ratio to nothing"


def test_a_report_as_text_has_a_line_a_row():
    lines = as_text(Report("step", "a machine", ROWS, {})).splitlines()
    assert lines[0] == "step: a machine"
    cells = [re.split("  +", line) for line in lines[2:]]
    assert cells == [
        ["overhead", "51", "50", "ms a step", "1.0200", "bare DeepSpeed loop"],
        ["extra_syncs", "0", "0", "a step", "-", "allowed"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "NAME"),
        (["steps"], "steps"),
        (["step", "--pairs", "1"], "--pairs 1"),
        (["step", "--cases", "stage3"], "stage3"),
        (["step", "--json", "no/such/folder/step.json"], "no/such/folder"),
        (["checkpoint", "--rounds", "1"], "--rounds 1"),
        (["checkpoint", "--local-dir", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = run_python("tools/benchmark.py", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["step", "--help"], ["checkpoint", "--help"]])
def test_help_shows_an_example(arguments):
    done = run_python("tools/benchmark.py", *arguments)
    assert done.returncode == 0
    assert "python tools/benchmark.py step" in done.stdout
