"""A resident encoder or teacher: the same steps as a sharded one, and nothing to gather."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.integration.test_memory_keys import take_steps
from tests.tiny import build_model, images_of, make_rank_folders, make_run
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run

pytestmark = pytest.mark.slow

STEPS = 3
PREFIXES = {1: "vqrae.encoder.", 2: "teacher."}


def run_of(folder: Path, stage: int, where: str, **deepspeed) -> Run:
    losses = {"perceptual": None, "adversarial": None}
    return make_run(
        folder, stage, losses=losses, memory={"frozen_encoder": where}, deepspeed=deepspeed
    )


def gathered_elements(engine, rank: int) -> int:
    """Elements that this rank gathers in one forward pass."""
    from deepspeed.comm import comm

    gather, sizes = comm.cdb.all_gather_function, []

    def counting_gather(*, output_tensor, **options):
        sizes.append(output_tensor.numel())
        return gather(output_tensor=output_tensor, **options)

    comm.cdb.all_gather_function = counting_gather
    try:
        with torch.no_grad():
            engine(images_of(0, rank))
    finally:
        comm.cdb.all_gather_function = gather
    return sum(sizes)


def run_stage(rank: int, folder: Path, stage: int) -> None:
    from vqrae_ds import engines
    from vqrae_ds.sharding import resident

    run = run_of(folder, stage, "sharded")
    sharded = engines.build_generator(run)
    assert resident.state(sharded.module) == {}
    gathered = gathered_elements(sharded, rank)
    losses = take_steps(sharded, run, rank, range(STEPS))
    names = [n for n in sharded.module.state_dict() if n.startswith(PREFIXES[stage])]

    run = run_of(folder, stage, "resident")
    engine = engines.build_generator(run)
    state = resident.state(engine.module)
    assert list(state) == names and not set(names) & set(engine.module.state_dict())
    encoder = build_model().encoder.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, encoder[name.removeprefix(PREFIXES[stage])]), name
    saved = gathered - gathered_elements(engine, rank)
    assert saved == sum(tensor.numel() for tensor in state.values()), "each was gathered once"
    assert saved < gathered, "the rest is sharded as before"
    engine.train()
    assert take_steps(engine, run, rank, range(STEPS)) == pytest.approx(losses, rel=1e-6)
    whole = engine.module.vqrae.encoder if stage == 1 else engine.module.teacher
    assert not whole.training and not any(p.requires_grad for p in whole.parameters())

    resident.check_filled(engine.module)
    name, tensor = next(iter(state.items()))
    kept = tensor.view(-1)[-1].clone()
    tensor.view(-1)[-1] = torch.nan
    own_name = name.removeprefix(PREFIXES[stage])
    with pytest.raises(AssertionError, match=f"no value was given to {own_name}$"):
        resident.check_filled(engine.module)
    tensor.view(-1)[-1] = kept
    check_loading(folder.parent / "shared", run, sharded, engine)


def check_loading(shared: Path, run: Run, sharded, engine) -> None:
    """Each rank has all of them after a resume, whether they were sharded before or not."""
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.sharding import resident

    output = run.config.run.model_copy(update={"output_dir": str(shared / f"s{run.config.stage}")})
    run = run._replace(config=run.config.model_copy(update={"run": output}))
    state = resident.state(engine.module)
    for step, saver in enumerate((engine, sharded)):
        saved = checkpoint.save(run, checkpoint.Content(saver, None, TrainState(STEPS + step)))
        again = engines.build_generator(run, fill=False)
        assert all(tensor.isnan().all() for tensor in resident.state(again.module).values())
        checkpoint.resume(saved, again, None)
        assert resident.state(again.module).keys() == state.keys()
        for name, tensor in resident.state(again.module).items():
            assert torch.equal(tensor, state[name]), name


def run_everything(rank: int, folder: Path) -> None:
    from vqrae_ds import engines
    from vqrae_ds.sharding import resident

    own = folder / f"rank{rank}"
    for stage in (1, 2):
        run_stage(rank, own, stage)
    run = run_of(own, 1, "resident", bf16={"enabled": True}, zero_optimization={"stage": 2})
    engine = engines.build_generator(run)
    state = resident.state(engine.module)
    encoder = build_model().encoder.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, encoder[name.removeprefix(PREFIXES[1])].bfloat16()), name
    take_steps(engine, run, rank, range(1))


def test_the_same_steps_and_nothing_gathered(tmp_path: Path) -> None:
    make_rank_folders(tmp_path, 2)
    run_ranks(2, run_everything, tmp_path)
