"""First weights on real ranks: what they cost in memory, and that none stays unset unnoticed."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import gathered, run_ranks
from tests.memory import sampled_memory
from tests.tiny import GAN, NUM_CODES, make_rank_folders, make_run
from vqrae_ds.config import ModelConfig, Run, resolve_model
from vqrae_ds.conversion.pretrained_encoders import import_encoder
from vqrae_ds.conversion.safetensors_stream import StreamedTensor, write_model
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.weights import WeightFolder, copy_weights

pytestmark = pytest.mark.slow

WIDTH, BLOCKS, MLP, PATCH, SIDE = 1024, 32, 4096, 14, 56  # 0.4e9 parameters
SHARD_BYTES = 100 << 20
PUBLISHED = {  # the publisher's words, as in InternViT-300M
    "model_type": "intern_vit_6b",
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 16,
    "intermediate_size": MLP,
    "image_size": SIDE,
    "patch_size": PATCH,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
}
DECODER = {"hidden_size": 64, "num_layers": 1, "num_heads": 4, "intermediate_size": 128}
BF16 = {"bf16": {"enabled": True}}
UNTRAINED = {"init": {"model": None, "allow_untrained_encoder": True}}


class Loaded(NamedTuple):
    """What one rank measured, in bytes."""

    share: int  # of the weights
    anonymous: int  # most memory above that before the build, mapped files not counted
    resident: int  # the same with mapped files


def published_tensors() -> list[StreamedTensor]:
    """A random encoder in the publisher's layout, drawn piece by piece while it is written."""
    shapes = {
        "embeddings.class_embedding": (1, 1, WIDTH),
        "embeddings.position_embedding": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (WIDTH,),
    }
    for i in range(BLOCKS):
        matrices = {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (MLP, WIDTH),
            "mlp.fc2": (WIDTH, MLP),
        }
        for name, (rows, columns) in matrices.items():
            shapes[f"encoder.layers.{i}.{name}.weight"] = (rows, columns)
            shapes[f"encoder.layers.{i}.{name}.bias"] = (rows,)
        for name in ("ls1", "ls2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"encoder.layers.{i}.{name}"] = (WIDTH,)

    def pieces(name: str, seed: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        middle = 1.0 if re.search(r"norm\d\.weight", name) else 0.0
        for part in torch.empty(math.prod(shapes[name]), device="meta").split(1 << 20):
            yield torch.empty(len(part)).normal_(middle, 0.03, generator=generator)

    return [
        StreamedTensor(name, shape, torch.float32, lambda name=name, seed=seed: pieces(name, seed))
        for seed, (name, shape) in enumerate(shapes.items())
    ]


@pytest.fixture(scope="module")
def encoder() -> Iterator[Path]:
    """The folder that the importer makes of it; 1.6 GB that do not stay until the next run."""
    with tempfile.TemporaryDirectory() as folder:
        source, imported = Path(folder) / "published", Path(folder) / "imported"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(PUBLISHED))
        write_model(source, published_tensors(), SHARD_BYTES, lambda written: None)
        import_encoder(source, imported, max_shard_bytes=SHARD_BYTES)
        shutil.rmtree(source)
        yield imported


def run_with(folder: Path, encoder: Path, deepspeed: dict) -> Run:
    """Stage 1, its decoder tiny: nearly all of it is the encoder."""
    model = {"encoder_config_path": str(encoder), "image_size": SIDE, "decoder": DECODER}
    init = {"model": None, "encoder_weights": str(encoder)}
    return make_run(folder, 1, deepspeed=deepspeed, model=model, init=init)


def load_encoder(rank: int, folder: Path, encoder: Path, deepspeed: dict) -> None:
    """Build as the trainer does; this rank's memory and features go to files."""
    from vqrae_ds import engines

    mine = folder / f"rank{rank}"
    mine.mkdir()
    run = run_with(mine, encoder, deepspeed)
    peaks: dict[str, int] = {}
    with sampled_memory(peaks):
        engine = engines.build_generator(run)
    share = sum(p.ds_tensor.nbytes for p in engine.module.parameters())
    loaded = Loaded(share, peaks["RssAnon"], peaks["VmRSS"])
    (mine / "loaded.json").write_text(json.dumps(loaded))
    with torch.no_grad():
        torch.save(engine(an_image()).vqrae.features_BND, mine / "features.pt")


def an_image() -> torch.Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loading_needs_the_share_of_a_rank_and_no_more(encoder, tmp_path, dtype):
    run_ranks(2, load_encoder, tmp_path, encoder, BF16 if dtype == torch.bfloat16 else {})
    whole = sum(path.stat().st_size for path in encoder.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in encoder.glob("*.safetensors"))
    assert whole > 1.6e9 and largest <= SHARD_BYTES + 1e5

    plain = build_encoder(resolve_model(ModelConfig(encoder_config_path=str(encoder))))
    copy_weights(plain.model, WeightFolder(encoder))
    with torch.no_grad():
        expected = plain.to(dtype)(an_image())
    for rank in range(2):
        mine = tmp_path / f"rank{rank}"
        loaded = Loaded(*json.loads((mine / "loaded.json").read_text()))
        assert loaded.share == pytest.approx(whole / 4 * dtype.itemsize / 2, rel=0.01)
        assert loaded.share <= loaded.anonymous < loaded.share + 2 * largest
        features = torch.load(mine / "features.pt")
        # In bf16 DeepSpeed's linear layer rounds once more, before the bias.
        assert difference(features, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def start_badly(rank: int, folder: Path) -> None:
    """Every mistake is an error on both ranks: a rank that fails alone leaves the other waiting."""
    from vqrae_ds import engines
    from vqrae_ds.models.simvq import FrozenCodebook

    mine = folder / f"rank{rank}"
    for zero in ({"stage": 1}, {"stage": 3}):
        untrained = make_run(mine, 1, deepspeed={"zero_optimization": zero}, **UNTRAINED)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FrozenCodebook, "reset_parameters", lambda self: None)
            expected = "no value was given to vqrae.quantizer.embedding.weight$"
            with pytest.raises(AssertionError, match=expected):
                engines.build_generator(untrained)

    damaged = mine / "initial" / "model.safetensors"
    weights = load_file(damaged)
    whole = {name: tensor.clone() for name, tensor in weights.items()}
    for value in (math.nan, math.inf):
        weights["encoder.model.encoder.layer.1.mlp.fc2.weight"][3, 5] = value
        save_file(weights, damaged)
        expected = f"encoder.layer.1.mlp.fc2.weight in {folder}/rank0/initial/model.safetensors"
        with pytest.raises(ValueError, match=expected):
            engines.build_generator(make_run(mine, 1))
    save_file(whole, damaged)

    def fail(self: WeightFolder, name: str) -> torch.Tensor:
        raise OSError("the disk is gone")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(WeightFolder, "read", fail)
        with pytest.raises((OSError, RuntimeError), match="the disk is gone"):
            engines.build_generator(make_run(mine, 1))

    run = make_run(mine, 1)
    if rank == 1:
        damaged.unlink()
    with pytest.raises(ValueError, match="rank1/initial holds neither model.safetensors nor"):
        engines.build_generator(run)

    discriminator = mine / "initial" / "discriminator.safetensors"
    weights = load_file(discriminator)
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file({name: tensor.clone() for name, tensor in weights.items()}, discriminator)
    with pytest.raises(ValueError, match=f"in {discriminator} holds NaN"):
        engines.build_discriminator(make_run(mine, 1, losses={"adversarial": GAN}))


def start_well(rank: int, folder: Path) -> None:
    from vqrae_ds import checkpoint, engines
    from vqrae_ds.sharding import first_weights

    mine = folder / f"rank{rank}"
    for stage in (1, 3):
        zero, output = {"stage": stage}, {"output_dir": str(folder / f"zero{stage}")}
        run = make_run(mine, 1, deepspeed={"zero_optimization": zero}, run=output)
        saved = checkpoint.save(
            run, checkpoint.Content(engines.build_generator(run), None, checkpoint.TrainState())
        )
        resumed = engines.build_generator(run, fill=False)
        with pytest.raises(AssertionError, match="vqrae.encoder.*, vqrae.standardize.mean"):
            first_weights.check_filled(resumed.module)
        checkpoint.resume(saved, resumed, None)
        first_weights.check_filled(resumed.module)

    run = make_run(mine, 1, model={"use_simvq": False}, **UNTRAINED)
    model = engines.build_generator(run).module
    codes = model.vqrae.quantizer.codes_at(torch.arange(NUM_CODES))
    torch.save(codes, mine / "codes.pt")


def build_in_bf16(rank: int, folder: Path) -> None:
    """Three ranks divide few of the sizes: shares are padded, and may be nothing but padding."""
    from deepspeed.utils import safe_get_full_fp32_param

    from vqrae_ds import engines

    weights = load_file(folder / f"rank{rank}" / "initial" / "model.safetensors")
    for stage in (1, 2, 3):
        deepspeed = {**BF16, "train_batch_size": 6, "zero_optimization": {"stage": stage}}
        run = make_run(folder / f"rank{rank}", 1, deepspeed=deepspeed, world_size=3)
        module = engines.build_generator(run).module
        parameters = {n.removeprefix("vqrae."): p for n, p in module.named_parameters()}
        with gathered(module):
            for name, parameter in parameters.items():
                assert torch.equal(parameter, weights[name].bfloat16()), f"{name}, {stage}"
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                master = safe_get_full_fp32_param(parameter)
                assert torch.equal(master, weights[name]), f"{name}, {stage}"


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a folder to start from for each of up to three ranks."""
    make_rank_folders(tmp_path, 3)
    return tmp_path


def test_what_is_not_set_is_named_on_every_rank(folder):
    run_ranks(2, start_badly, folder)


def test_what_is_to_be_set_is_set(folder):
    run_ranks(2, start_well, folder)
    ours, theirs = (torch.load(folder / f"rank{rank}" / "codes.pt") for rank in range(2))
    assert torch.equal(ours, theirs)
    assert 0.01 < ours.std() < 1


def test_uneven_shares(folder):
    run_ranks(3, build_in_bf16, folder)
