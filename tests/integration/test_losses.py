"""The losses on two ranks: blur-pool discriminator, LeCam, adaptive weight and accumulation.

In fp32 against one process that sees the batches of both ranks, written out here; in bf16 the
dtypes; in both what a checkpoint brings back. And a teacher that is there for validation alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import GAN, build_model, images_of, make_run, make_setup, setup_of
from vqrae_ds.config import Run
from vqrae_ds.models.decoder import unpatchify
from vqrae_ds.models.discriminator import BlurPoolDiscriminator

pytestmark = pytest.mark.slow

WORLD_SIZE, ACCUMULATION, STEPS, RATE = 2, 2, 4, 0.05
SAVED_AFTER = 2
GAN_WEIGHT, LECAM_WEIGHT, DECAY = 0.3, 0.5, 0.999
COMPARED = ("loss/total", "gan/adaptive_weight", "gan/discriminator", "gan/lecam")


def save_first_weights(folder: Path) -> None:
    build_model().save_pretrained(folder)
    torch.manual_seed(1)
    discriminator = BlurPoolDiscriminator(**GAN)
    with torch.no_grad():
        discriminator.layers[-1].weight.mul_(5)  # logits far apart: LeCam has something to do
    save_file(discriminator.state_dict(), folder / "discriminator.safetensors")


def make_gan_run(folder: Path, *, bf16: bool, output_dir: Path) -> Run:
    gan = {"discriminator": "blur_pool", "weight": GAN_WEIGHT, "lecam_weight": LECAM_WEIGHT, **GAN}
    deepspeed = {
        "train_batch_size": 2 * ACCUMULATION * WORLD_SIZE,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
    }
    losses = {"perceptual": None, "adversarial": gan}
    run = {"output_dir": str(output_dir)}
    return make_run(folder, 1, losses=losses, deepspeed=deepspeed, run=run)


def train_everything(rank: int, folder: Path) -> None:
    """fp32 and bf16, each straight and with a resume from a checkpoint half way."""
    from vqrae_ds import checkpoint

    mine = folder / f"rank{rank}"
    mine.mkdir()
    (mine / "initial").symlink_to(folder / "initial")
    found = {}
    for name in ("fp32", "bf16"):
        run = make_gan_run(mine, bf16=name == "bf16", output_dir=folder / name)
        straight = Training(run)
        found[name] = straight.steps(rank, 0, STEPS)
        found[name] |= {"state": straight.state(), "reductions": straight.reductions}

        saved = Training(run)
        saved.steps(rank, 0, SAVED_AFTER)
        saved.objective.settle()
        reached = checkpoint.TrainState(SAVED_AFTER, 0)
        checkpoint.save(run, checkpoint.Content(saved.generator, saved.discriminator, reached))
        resumed = Training(run, fill=False)
        newest = checkpoint.find(run)
        state, *_ = checkpoint.resume(newest, resumed.generator, resumed.discriminator)
        found[name]["resumed"] = resumed.steps(rank, state.step, STEPS)
        found[name]["resumed"]["state"] = resumed.state()
    found["teacher"] = retention_in_validation(rank, mine)
    torch.save(found, folder / f"found{rank}.pt")


def retention_in_validation(rank: int, folder: Path) -> list[torch.Tensor | None]:
    """Teacher features in training, validation, training, validation, without a weight."""
    from vqrae_ds.train import micro_step

    losses = {"perceptual": None, "distillation": {"teacher": {"weight": 0.0}}}
    run = make_run(folder, 2, losses=losses)
    setup, images, found = make_setup(run), images_of(0, rank), []
    generator = setup.generator
    for step in range(2):
        terms, _ = micro_step(setup, images, step)
        found.append(terms.get("retention/cosine"))
        generator.eval()
        with torch.no_grad():
            found.append(generator(images).teacher_features_BND)
        generator.train()
    return found


class Training:
    """The trainer's own micro steps, with a count of its small reductions."""

    def __init__(self, run: Run, *, fill: bool = True) -> None:
        from vqrae_ds import engines
        from vqrae_ds.losses.objective import Objective

        self.generator = engines.build_generator(run, fill=fill)
        self.discriminator = engines.build_discriminator(run, fill=fill)
        self.reductions: list[int] = []

        def counted(tensor: Tensor) -> Tensor:
            self.reductions[-1] += 1
            return engines.mean_over_ranks(tensor)

        self.objective = Objective(
            run.config.losses, None, None, self.discriminator.module, counted
        )
        self.setup = setup_of(self.generator, self.discriminator, self.objective)

    def steps(self, rank: int, first: int, last: int) -> dict[str, Any]:
        """The terms of each micro step, and the averages of LeCam after it."""
        from vqrae_ds.train import micro_step

        terms, averages = [], []
        for step in range(first, last):
            for micro in range(ACCUMULATION):
                self.reductions.append(0)
                images = images_of(10 * step + micro, rank)
                found, _ = micro_step(self.setup, images, step)
                terms.append({name: value.item() for name, value in found.items()})
                averages.append(self.discriminator.module.averages.means_2.clone())
        self.reductions.append(0)
        return {"terms": terms, "averages": torch.stack(averages)}

    def state(self) -> dict[str, Tensor]:
        return {n: t.clone() for n, t in self.discriminator.module.state_dict().items()}


def reference(folder: Path) -> dict[str, Any]:
    """One process of plain PyTorch; the averages move by the means of each whole step."""
    model = build_model(freeze_encoder=True)
    discriminator = BlurPoolDiscriminator(**GAN)
    discriminator.load_state_dict(load_file(folder / "initial" / "discriminator.safetensors"))
    trained = [p for p in model.parameters() if p.requires_grad]
    means: list[float] | None = None
    terms: list[list[dict[str, float]]] = [[] for _ in range(WORLD_SIZE)]
    averages = []
    for step in range(STEPS):
        model_grads, critic_grads, logits = [], [], []
        for micro in range(ACCUMULATION):
            batches = [images_of(10 * step + micro, rank) for rank in range(WORLD_SIZE)]
            outputs = [model(images) for images in batches]
            fakes = [unpatchify(output.patches_BhwP) for output in outputs]
            errors = [F.mse_loss(fake, x) for fake, x in zip(fakes, batches, strict=True)]
            wishes = [-discriminator(fake).mean() for fake in fakes]
            if micro == 0:
                adaptive = textbook_adaptive_weight(errors, wishes, model.decoder.head.weight)
            for rank, x in enumerate(batches):
                total = errors[rank] + outputs[rank].vq_loss + GAN_WEIGHT * adaptive * wishes[rank]
                model_grads.append(gradients(total, trained))
                real, fake = discriminator(x), discriminator(fakes[rank].detach())
                hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
                lecam = textbook_lecam(real, fake, means)
                loss = hinge + LECAM_WEIGHT * lecam
                critic_grads.append(gradients(loss, discriminator.parameters()))
                logits.append([real.mean().item(), fake.mean().item()])
                values = (total, adaptive, hinge, lecam)
                terms[rank].append({n: v.item() for n, v in zip(COMPARED, values, strict=True)})
            averages.append(means or [0.0, 0.0])
        new = [sum(side) / len(logits) for side in zip(*logits, strict=True)]
        old = means or new
        means = [DECAY * a + (1 - DECAY) * b for a, b in zip(old, new, strict=True)]
        step_down(trained, model_grads)
        step_down(discriminator.parameters(), critic_grads)
    return {"terms": terms, "averages": averages, "critic": discriminator.state_dict()}


def textbook_adaptive_weight(
    errors: list[Tensor], wishes: list[Tensor], head_weight: Tensor
) -> Tensor:
    """VQGAN's ratio of gradient norms at the last layer; norms are root mean squares over ranks."""

    def norm(losses: list[Tensor]) -> Tensor:
        grads = [torch.autograd.grad(x, head_weight, retain_graph=True)[0] for x in losses]
        return torch.stack([grad.square().sum() for grad in grads]).mean().sqrt()

    return norm(errors) / (norm(wishes) + 1e-4)


def textbook_lecam(real: Tensor, fake: Tensor, means: list[float] | None) -> Tensor:
    """arXiv:2104.03310 with the one-sided distances of its code; nothing in the first step."""
    if means is None:
        return torch.zeros(())
    return F.relu(real - means[1]).square().mean() + F.relu(means[0] - fake).square().mean()


def gradients(loss: Tensor, parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        loss, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True
    )


@torch.no_grad()
def step_down(parameters: Iterable[Tensor], grads: list[tuple[Tensor, ...]]) -> None:
    """SGD along the mean of the gradients of all micro batches of all ranks."""
    for parameter, parts in zip(parameters, zip(*grads, strict=True), strict=True):
        parameter -= RATE * torch.stack(parts).mean(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan")
    save_first_weights(folder / "initial")
    run_ranks(WORLD_SIZE, train_everything, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found{rank}.pt") for rank in range(WORLD_SIZE)]


def test_losses_and_averages_are_those_of_one_process(folder, found) -> None:
    expected = reference(folder)
    lecams = [terms["gan/lecam"] for terms in expected["terms"][0]]
    assert lecams[:ACCUMULATION] == [0.0] * ACCUMULATION and min(lecams[ACCUMULATION:]) > 0.1
    for rank, ours in enumerate(found):
        for mine, theirs in zip(ours["fp32"]["terms"], expected["terms"][rank], strict=True):
            for name in COMPARED:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-7), name
        averages = torch.tensor(expected["averages"])
        torch.testing.assert_close(ours["fp32"]["averages"], averages, rtol=1e-6, atol=1e-7)
        for name, value in expected["critic"].items():
            torch.testing.assert_close(ours["fp32"]["state"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_small_reduction_a_step(found, dtype) -> None:
    for ours in found:
        assert ours[dtype]["reductions"] == [1, *[0] * (ACCUMULATION - 1)] * STEPS + [0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ranks_hold_the_same_averages(found, dtype) -> None:
    assert torch.equal(*(ours[dtype]["averages"] for ours in found))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resume_changes_no_bit(found, dtype) -> None:
    for ours in found:
        straight, resumed = ours[dtype], ours[dtype]["resumed"]
        after = SAVED_AFTER * ACCUMULATION
        assert straight["terms"][after:] == resumed["terms"]
        assert torch.equal(straight["averages"][after:], resumed["averages"])
        assert straight["state"].keys() == resumed["state"].keys()
        for name, value in straight["state"].items():
            assert torch.equal(value, resumed["state"][name]), name


def test_bf16_rounds_the_weights_and_not_the_averages(found) -> None:
    for ours in found:
        for name, value in ours["bf16"]["state"].items():
            averages = name.startswith("averages.")
            assert value.dtype == (torch.float32 if averages else torch.bfloat16), name
        fp32, bf16 = ours["fp32"]["terms"], ours["bf16"]["terms"]
        for mine, theirs in zip(bf16, fp32, strict=True):
            assert mine["gan/discriminator"] == pytest.approx(theirs["gan/discriminator"], rel=0.02)
        assert fp32 != bf16


def test_a_teacher_without_weight_is_there_for_validation_alone(folder, found) -> None:
    encoder = build_model().encoder
    for rank, ours in enumerate(found):
        with torch.no_grad():
            expected = encoder(images_of(0, rank))
        in_training, in_validation = ours["teacher"][::2], ours["teacher"][1::2]
        assert in_training == [None, None]
        for features in in_validation:
            torch.testing.assert_close(features, expected)


def test_the_next_stage_takes_the_averages_over(folder, found) -> None:
    from vqrae_ds.config import AdversarialConfig, InitConfig
    from vqrae_ds.conversion.consolidate import consolidate, verify
    from vqrae_ds.manifest import find_step_folder
    from vqrae_ds.models.discriminator import build_discriminator
    from vqrae_ds.sharding.first_discriminator import load_discriminator

    step = find_step_folder(folder / "fp32")
    consolidate(step, folder / "weights", to="stage2")
    verify(step, folder / "weights")
    for lecam_weight in (0.1, 0.0):
        config = AdversarialConfig(discriminator="blur_pool", lecam_weight=lecam_weight, **GAN)
        discriminator = build_discriminator(config)
        load_discriminator(discriminator, InitConfig(model=str(folder / "weights")))
        if lecam_weight:  # saved are the averages that the next micro step began with
            begun = found[0]["fp32"]["averages"][SAVED_AFTER * ACCUMULATION]
            assert torch.equal(discriminator.averages.means_2, begun)
            assert discriminator.averages.started == 1
