"""A run that starts from the weights of another one's checkpoint, on real ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import gathered, run_ranks
from tests.tiny import GAN, images_of, make_rank_folders, make_run, save_initial
from vqrae_ds import checkpoint
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run

pytestmark = pytest.mark.slow

BF16 = {"bf16": {"enabled": True}}
PRECISIONS = {"fp32": {}, "bf16": BF16}
UNTRAINED = {"allow_untrained_encoder": True}


def held(engine: Any) -> dict[str, torch.Tensor]:
    """All that is stored: fp32 masters where there are any, else the weights, and the buffers."""
    from deepspeed.utils import safe_get_full_fp32_param

    module, tensors = engine.module, {}
    with gathered(module):
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                tensors[name] = parameter.detach().clone()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            tensors[name] = safe_get_full_fp32_param(parameter).clone()
    stored = module.state_dict()
    return tensors | {n: b.clone() for n, b in module.named_buffers() if n in stored}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def of_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if n.startswith("vqrae.")}


def run_in(folder: Path, rank: int, stage: int, precision: str, **changes: Any) -> Run:
    """With a GAN in stage 1."""
    losses = {"adversarial": changes.pop("gan", GAN) if stage == 1 else None}
    zero = {"stage": changes.pop("zero", 3), "sub_group_size": 5000}
    ranks = torch.distributed.get_world_size()
    more = {"train_batch_size": 2 * ranks, "zero_optimization": zero, **PRECISIONS[precision]}
    return make_run(
        folder / f"rank{rank}", stage, losses=losses, deepspeed=more, world_size=ranks, **changes
    )


def train_and_save(rank: int, folder: Path) -> None:
    """Checkpoints of both stages in both precisions, and what the engines held."""
    from vqrae_ds import engines

    for stage in (1, 2):
        for precision in PRECISIONS:
            home = folder / f"stage{stage}_{precision}"
            run = run_in(folder, rank, stage, precision, run={"output_dir": str(home)})
            generator, discriminator = (
                engines.build_generator(run),
                engines.build_discriminator(run),
            )
            for step in range(2):
                output = generator(images_of(step, rank)).vqrae
                loss = output.patches_BhwP.float().square().mean() + output.vq_loss
                generator.backward(loss + output.features_BND.float().square().mean())
                generator.step()
            tensors = {"generator": held(generator)}
            if discriminator is not None:
                images = images_of(0, rank).to(next(discriminator.module.parameters()).dtype)
                discriminator.backward(discriminator(images).float().square().mean())
                discriminator.step()
                tensors["discriminator"] = held(discriminator)
            checkpoint.save(run, checkpoint.Content(generator, discriminator, TrainState(2, 4 * 2)))
            if rank == 0:
                torch.save(tensors, home / "held.pt")


def start(folder: Path, rank: int, stage: int, precision: str, home: Path, **changes: Any) -> Run:
    """A new run from that in `home`, as the trainer resolves it."""
    init = {"model": None, "from_run": str(home)}
    output = {"output_dir": str(folder / "new")}
    run = run_in(folder, rank, stage, precision, init=init, run=output, **changes)
    assert checkpoint.find(run) is None
    resolved = checkpoint.resolve_start(run)
    assert resolved.config.init.from_run == str(home / "checkpoints" / "step_00000002")
    return resolved


def start_from_runs(rank: int, folder: Path, zero_stages: list[int]) -> None:
    """Weights alone go over, to the last bit, whatever the number of ranks and the ZeRO stage."""
    from vqrae_ds import engines

    for precision in PRECISIONS:
        first, second = (folder / f"stage{stage}_{precision}" for stage in (1, 2))
        of_first, of_second = (torch.load(home / "held.pt") for home in (first, second))
        for zero in zero_stages:
            run = start(folder, rank, 1, precision, first, zero=zero)
            assert_same(held(engines.build_generator(run)), of_first["generator"])
        if precision == "fp32":
            run = start(folder, rank, 1, precision, first)
            assert_same(held(engines.build_discriminator(run)), of_first["discriminator"])

        tensors = held(engines.build_generator(start(folder, rank, 2, precision, first)))
        encoder = "vqrae.encoder."
        assert any(name.startswith("teacher.") for name in tensors)
        for name, tensor in of_first["generator"].items():
            assert torch.equal(tensors[name].to(tensor.dtype), tensor), name
            if name.startswith(encoder):
                teacher = tensors[f"teacher.{name.removeprefix(encoder)}"]
                assert torch.equal(teacher, tensor.to(teacher.dtype)), name

        tensors = held(engines.build_generator(start(folder, rank, 2, precision, second)))
        assert_same(tensors, of_second["generator"])
        moved = [
            name
            for name, tensor in tensors.items()
            if name.startswith("teacher.")
            and not torch.equal(tensor, tensors[f"{encoder}{name[8:]}"].to(tensor.dtype))
        ]
        assert moved, "the teacher must differ from the encoder for this to prove anything"

        tensors = held(engines.build_generator(start(folder, rank, 1, precision, second)))
        for name, tensor in of_model(of_second["generator"]).items():
            assert torch.equal(tensors[name], tensor.to(tensors[name].dtype)), name


def toggle_lecam(rank: int, folder: Path) -> None:
    """The discriminator goes on; the averages do where LeCam is on now and was on before."""
    from vqrae_ds import engines

    home, with_it = folder / "stage1_fp32", {**GAN, "lecam_weight": 0.1}
    first = torch.load(home / "held.pt")["discriminator"]
    run = start(folder, rank, 1, "fp32", home, gan=with_it)
    discriminator = engines.build_discriminator(run)
    weights = held(discriminator)
    assert weights.pop("averages.means_2").tolist() == [0, 0]
    assert weights.pop("averages.started") == 0
    assert_same(weights, first)

    discriminator.module.averages.update(torch.tensor([2.0, -1.0]))
    discriminator.backward(discriminator(images_of(1, rank)).square().mean())
    discriminator.step()
    moved = held(discriminator)
    later = folder / "stage1_lecam"
    run = run_in(folder, rank, 1, "fp32", gan=with_it, run={"output_dir": str(later)})
    content = checkpoint.Content(engines.build_generator(run), discriminator, TrainState(2, 4 * 2))
    checkpoint.save(run, content)
    again = engines.build_discriminator(start(folder, rank, 1, "fp32", later, gan=with_it))
    assert_same(held(again), moved)
    assert moved["averages.means_2"].tolist() == [2, -1]
    without = held(engines.build_discriminator(start(folder, rank, 1, "fp32", later)))
    assert_same(without, {n: t for n, t in moved.items() if not n.startswith("averages.")})
    assert any(not torch.equal(tensor, first[name]) for name, tensor in without.items())


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def start_otherwise(rank: int, folder: Path) -> None:
    """Discriminators that are not there or of another architecture, and a damaged checkpoint."""
    from vqrae_ds import engines

    log = Lines()
    logging.getLogger("vqrae_ds").addHandler(log)
    logging.getLogger("vqrae_ds").setLevel("INFO")
    home = folder / "stage1_fp32"
    wider = {**GAN, "channels": 2 * GAN["channels"]}
    fresh = run_in(folder, rank, 1, "fp32", gan=wider, init={"model": None, **UNTRAINED})
    untrained = held(engines.build_discriminator(fresh))
    run = start(folder, rank, 1, "fp32", home, gan=wider)
    assert_same(held(engines.build_discriminator(run)), untrained)
    assert "of another architecture: the discriminator starts untrained" in log.lines[-1]
    run = start(folder, rank, 1, "fp32", folder / "stage2_fp32")
    engines.build_discriminator(run)
    assert "does not exist: the discriminator starts untrained" in log.lines[-1]

    damaged = home / "checkpoints" / "step_00000002" / "generator"
    damaged = next(damaged.glob("zero_pp_rank_1_*_optim_states.pt"))
    torch.distributed.barrier()
    if rank == 0:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=f"{damaged.name} does not match its checksum"):
        start(folder, rank, 1, "fp32", home)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("from_run")
    make_rank_folders(folder, 3)
    run_ranks(2, train_and_save, folder)
    return folder


def test_weights_go_over_bit_for_bit(folder):
    run_ranks(2, start_from_runs, folder, [1, 3])


def test_weights_go_over_to_another_number_of_ranks(folder):
    run_ranks(3, start_from_runs, folder, [2, 3])


def test_another_model_is_refused_before_anything_is_built(folder, tmp_path):
    save_initial(tmp_path / "initial")
    init = {"model": None, "from_run": str(folder / "stage1_fp32")}
    make_run(tmp_path, 1, init=init)
    with pytest.raises(ValueError, match="num_embeddings = 32 differs from 64 in .*model_config"):
        make_run(tmp_path, 1, init=init, model={"num_embeddings": 32})
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=f"init.from_run: {empty} holds no complete checkpoint"):
        make_run(tmp_path, 1, init={**init, "from_run": str(empty)})


def test_lecam_may_be_on_in_one_of_the_two_runs(folder):
    run_ranks(2, toggle_lecam, folder)


def test_what_cannot_go_over_is_said(folder):
    run_ranks(2, start_otherwise, folder)
