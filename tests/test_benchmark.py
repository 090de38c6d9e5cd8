"""What the benchmarks compare and print; the loops themselves are timed nowhere here."""

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
from vqrae_ds.benchmarks.counting import extra
from vqrae_ds.benchmarks.step import (
    BLOCK_STEPS,
    COUNTED_STEPS,
    WARM_UP_STEPS,
    Found,
    paired_ratios,
    take_turns,
)
from vqrae_ds.benchmarks.table import Goal, Report, Row, as_json, as_text, judge
from vqrae_ds.config import AdversarialConfig, DistillationConfig, LossConfig
from vqrae_ds.losses.objective import Objective
from vqrae_ds.models.discriminator import PatchDiscriminator
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.training_model import TrainingModel

CPU = torch.device("cpu")
X = torch.tensor([1.0, -2.0, 3.0])


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


def test_what_is_planted_into_a_loop_is_found(one_rank):
    found, _ = take_turns_with(step_of_a_leaky_loop, step_of_a_loop, pairs=2)
    assert extra(found.ours.collectives, found.bare.collectives) == COUNTED_STEPS
    assert extra(found.ours.waits, found.bare.waits) == COUNTED_STEPS
    clean, _ = take_turns_with(step_of_a_loop, step_of_a_loop, pairs=2)
    assert extra(clean.ours.collectives, clean.bare.collectives) == 0
    assert extra(clean.ours.waits, clean.bare.waits) == 0
    assert clean.ours.collectives.total() == COUNTED_STEPS


def test_the_loops_take_turns(one_rank):
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
    "ours, goal, is_met",
    [
        (1.15, Goal(0, 1.15), True),
        (1.16, Goal(0, 1.15), False),
        (0.92, Goal(0.93, 1.07), False),
        (1.07, Goal(0.93, 1.07), True),
        (40.0, Goal(1, None), True),
        (0.99, Goal(1, None), False),
    ],
)
def test_a_goal_is_met_within_its_range(ours, goal, is_met):
    rows = [Row("search", 2 * ours, 2.0, "product", "ms"), *ROWS]
    assert judge(rows, {"search": goal})["search"]["is_met"] == is_met


@pytest.mark.parametrize("name", ["kernel", "mfu"])
def test_what_needs_a_gpu_says_so_in_one_line(name, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = run_python("tools/benchmark.py", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs a GPU" in done.stderr and done.stderr.count("\n") == 1


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
        (["convert", "--rounds", "1"], "--rounds 1"),
        (["kernel", "--rounds", "1"], "--rounds 1"),
        (["data", "--rounds", "1"], "--rounds 1"),
        (["data", "--rounds", "3", "--peer-resume-rounds", "4"], "--peer-resume-rounds 4"),
        (["data", "--peer-resume-rounds", "0"], "--peer-resume-rounds 0"),
        (["data", "--folder", "no/such/folder"], "no/such/folder"),
        (["tokenize", "--rounds", "1"], "--rounds 1"),
        (["tokenize", "--model", "no/such/folder"], "no/such/folder"),
        (["mfu", "--steps", "1"], "--steps 1"),
        (["mfu", "--encoder-blocks", "0"], "--encoder-blocks 0"),
        (["mfu", "--peak-tflops", "nan"], "--peak-tflops nan"),
        (["mfu", "--config", "ds_configs/tiny/stage1.yaml"], "--deepspeed_config"),
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
