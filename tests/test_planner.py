"""Parts and states against published sizes and sums by hand, and what the plan says of them."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import ROOT
from vqrae_ds.config import Run, read_run
from vqrae_ds.losses import perceptual
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.planning import GB, Part, Plan, describe_plan, plan, state_bytes


def run_of(recipe: str, *overrides: str, deepspeed: str = "", gpus: int = 2) -> Run:
    """A recipe of ds_configs with the JSON of its stage, or another one."""
    machine = "cpu" if recipe.startswith("tiny") else "zero3"
    deepspeed = deepspeed or f"stage{recipe[-1]}_{machine}"
    files = (f"ds_configs/{recipe}.yaml", f"ds_configs/{deepspeed}.json")
    paths = (ROOT / file for file in files)
    return read_run(*paths, overrides=overrides, world_size=gpus, check_paths=False)


def parts_of(plan: Plan) -> dict[str, Part]:
    return {part.name: part for part in plan.parts}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        ("internvit_6b/stage1", 5_536_496_000),
        ("internvit_6b/v1_0_224px_stage1", 5_902_793_600),  # published: 5903 M
        ("internvit_6b/v1_0_448px_stage1", 5_905_251_200),
        ("internvit_300m/stage1", 304_012_288),  # published: 304 M
        ("siglip_l/stage1", 303_686_656),
        ("siglip2_so400m/stage1", 412_647_408),
        ("dinov2_b/stage1", 86_578_176),
        ("dinov2_b/registers_stage1", 86_581_248),
    ],
)
def test_size_of_the_encoder(recipe: str, count: int) -> None:
    """SigLIP and DINOv2 without the 2 x width of their last norm: `wNorm` leaves them out."""
    encoder = plan(run_of(recipe)).parts[0]
    assert (encoder.name, encoder.count, encoder.kind) == ("encoder", count, "frozen")


def test_the_other_number_of_the_6b_is_explained() -> None:
    text = describe_plan(plan(run_of("internvit_6b/stage1")), 8, 80)
    assert "5,536,496,000" in text and "transformers counts 5,536,502,400 for the encoder" in text
    assert plan(run_of("dinov2_b/stage1")).note == ""


def test_a_cut_encoder_is_mirrored() -> None:
    parts = parts_of(plan(run_of("internvit_6b/v1_0_448px_stage1", "model.feature_layer=-4")))
    assert parts["encoder"].count == 5_536_496_000, "45 of the 48 blocks: V1.2's size"
    assert "45 blocks x 3200, 25 heads (3 more in the" in parts["encoder"].what
    assert parts["decoder"].what.startswith("45 blocks x 3200, 25 heads, 14 x 14 px")


def test_parts_of_the_6b_by_hand() -> None:
    """Stage 2 of the symmetric model: width D, mlp M, 25 heads of 128, codes of E."""
    D, M, E = 3200, 12800, 1536
    block = (3 * D * D + 3 * D) + (D * D + D) + 2 * 128  # qkv, proj, the norm of a head's q and k
    block += (D * M + M) + (M * D + D) + 2 * D + 2 * D  # mlp, two RMS norms, two layer scales
    side = 3 * 14 * 14
    expected = {
        "encoder": (5_536_496_000, "trained"),
        "teacher": (5_536_496_000, "frozen"),
        "projections": ((D * E + E) + (E * D + D), "trained"),
        "codebook": (16384 * E, "frozen"),
        "code projection": (E * E + E, "trained"),
        "decoder": (45 * block + 256 * D + D + (D * side + side), "trained"),
        "buffers": (2 * D, "buffers"),
        "LPIPS": (14_714_688 + 1472, "frozen"),
    }
    parts = parts_of(plan(run_of("internvit_6b/stage2")))
    assert {name: (part.count, part.kind) for name, part in parts.items()} == expected


@pytest.mark.parametrize("recipe", ["internvit_300m/stage1", "siglip_l/stage2", "tiny/stage2"])
def test_the_parts_are_the_whole_model(recipe: str) -> None:
    run = run_of(recipe)
    with torch.device("meta"):
        vqrae = VQRAE(config=run.config.model, freeze_encoder=run.config.stage == 1)
        teacher = VQRAE(config=run.config.model).encoder if run.config.stage == 2 else None
    model, planned = TrainingModel(vqrae, teacher), plan(run)
    for kind, trains in (("trained", True), ("frozen", False)):
        ours = (p.count for p in planned.parts if p.kind == kind and p.engine == "generator")
        theirs = (p.numel() for p in model.parameters() if p.requires_grad == trains)
        assert sum(ours) == sum(theirs)


def test_lpips_is_as_large_as_its_network() -> None:
    graph = perceptual._build_graph()
    (row,) = (p for p in plan(run_of("tiny/stage1")).parts if p.name == "LPIPS")
    assert row.count == sum(parameter.numel() for parameter in graph.parameters())


def test_a_codebook_of_moving_averages_is_in_buffers() -> None:
    parts = parts_of(plan(run_of("dinov2_b/initial_stage1")))
    assert "codebook" not in parts and "code projection" not in parts
    assert parts["buffers"].count >= 2 * 768 + 2 * 8192 * 768
    assert parts["buffers"].what.startswith("EMA codebook: 8,192 codes of 768")


def test_terms_that_are_off_take_nothing() -> None:
    off = ("losses.perceptual=null", "losses.distillation=null")
    assert {"LPIPS", "teacher"}.isdisjoint(parts_of(plan(run_of("tiny/stage2", *off))))
    for_validation = run_of("tiny/stage2", "losses.distillation.teacher.weight=0")
    assert "teacher" in parts_of(plan(for_validation))
    assert "discriminator" not in parts_of(plan(run_of("tiny/stage1", "losses.adversarial=null")))


@pytest.mark.parametrize(("stage", "generator"), [(1, 13.9), (2, 26.3)])
def test_states_of_the_6b_on_8_gpus(stage: int, generator: float) -> None:
    """bf16, fp32 gradients, masters, Adam: (18 x trained + 2 x frozen) / 8, and the small rest."""
    planned = plan(run_of(f"internvit_6b/stage{stage}"))
    parts, sizes = parts_of(planned), state_bytes(planned, 8)
    own = [part for part in planned.parts if part.engine == "generator"]
    by_hand = sum(part.count * (18 if part.kind == "trained" else 2) / 8 for part in own)
    assert round(by_hand / GB, 1) == generator
    rest = 4 * (parts["buffers"].count + parts["LPIPS"].count)
    if stage == 1:  # ZeRO-1: parameters and both gradients whole, masters and Adam divided
        rest += parts["discriminator"].count * (2 + 6 + 12 / 8)
    assert sum(sizes) == pytest.approx(by_hand + rest)
    text = describe_plan(planned, 8, 80)
    total = f"model states {sum(sizes) / GB:.1f} GB of 80 GB a GPU, of which the generator"
    assert f"{total} {generator}" in text and "does not fit" not in text


def test_where_the_states_are_besides_the_gpus() -> None:
    """At 6B, in stage 1: 5.5 G frozen, 5.5 G trained with 18 bytes each, on 64 GPUs of 8 a node."""
    parts = parts_of(plan(run_of("internvit_6b/stage1", gpus=64)))
    frozen, trained = parts["encoder"].count, parts["decoder"].count

    def sizes(*overrides: str, gpus: int = 64) -> tuple[float, float]:
        planned = plan(run_of("internvit_6b/stage1", *overrides, gpus=gpus))
        found = dict(zip((p.name for p in planned.parts), state_bytes(planned, gpus), strict=True))
        return found["encoder"], found["decoder"]

    assert sizes() == pytest.approx((2 * frozen / 64, 18 * trained / 64))
    resident = "memory.frozen_encoder=resident"
    assert sizes(resident) == pytest.approx((2 * frozen, 18 * trained / 64))
    hpz = "deepspeed.zero_optimization.zero_hpz_partition_size=8"
    in_node = (2 * frozen / 8, 2 * trained / 8)
    assert sizes(hpz) == pytest.approx(
        (in_node[0] + 2 * frozen / 64, in_node[1] + 18 * trained / 64)
    )
    offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
    assert sizes(offload, gpus=2) == pytest.approx((frozen, trained))
    teacher = plan(run_of("internvit_6b/stage2", resident)).parts[:2]
    assert [(p.name, p.engine) for p in teacher] == [
        ("encoder", "generator"),
        ("teacher", "resident"),
    ]


def test_the_way_out_of_too_little_memory() -> None:
    planned = plan(run_of("internvit_6b/stage2", gpus=1))
    text = describe_plan(planned, 1, 24)
    assert (
        "does not fit into 24 GB a GPU, of which 3 GB are a reserve\nit fits from 16 GPUs on: "
        in text
    )
    micro = "deepspeed.train_micro_batch_size_per_gpu=64"
    run = run_of("internvit_300m/stage2", micro, deepspeed="stage2_one_gpu", gpus=1)
    text = describe_plan(plan(run), 1, 4)
    assert "it does not fit on any number of GPUs up to 4" in text


def test_the_batch_must_be_divided_by_the_gpus() -> None:
    with pytest.raises(ValueError, match="with this micro batch it can run on 1, 2, 4, 8 ranks"):
        describe_plan(plan(run_of("internvit_6b/stage1")), 3, 80)
