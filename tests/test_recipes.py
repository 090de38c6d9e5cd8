"""The recipes in ds_configs: each is whole, and the commands in its header resolve."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import ROOT
from vqrae_ds.config import Run, TrainConfig, read_run, resolve_model
from vqrae_ds.config.checking import check
from vqrae_ds.config.deepspeed_json import batch_arithmetic, check_keys
from vqrae_ds.config.files import BASE, read_json, read_recipe
from vqrae_ds.monitoring.flops import flops_per_image

FOLDER = Path("ds_configs")
RECIPES = sorted(p.relative_to(ROOT) for p in (ROOT / FOLDER).rglob("*.yaml"))
JSONS = sorted(p.relative_to(ROOT) for p in (ROOT / FOLDER).glob("*.json"))
QUICKSTART = "bash launchers/quickstart.sh"
KINDS = ("zero3", "one_gpu")  # of DeepSpeed JSON, by the size of the machine
OF_THE_PAPER = {  # Table 7: recipe -> global batch, steps, first step of the discriminator
    "internvit_300m/paper_stage1": (768, 45_000, None),
    "internvit_300m/paper_stage2": (768, 60_000, 30_000),
    "internvit_6b/paper_stage1": (768, 45_000, None),
    "internvit_6b/paper_stage2": (768, 60_000, 30_000),
    "siglip2_so400m/paper_stage1": (1024, 100_000, None),
    "siglip2_so400m/paper_stage2": (1024, 70_000, 50_000),
}


class Command(NamedTuple):
    """A call of the trainer."""

    config: Path
    deepspeed: Path
    ranks: int
    overrides: tuple[str, ...]


def header(path: Path) -> str:
    """The comment that opens a file, with continued lines joined."""
    lines = itertools.takewhile(lambda line: line[:1] == "#", (ROOT / path).read_text().split("\n"))
    return "\n".join(line[1:].strip() for line in lines).replace("\\\n", " ")


def lines_that_start(start: str, path: Path) -> list[list[str]]:
    """The words behind `start` in each such line of the header."""
    found = [line for line in header(path).split("\n") if line.startswith(start)]
    return [shlex.split(line.removeprefix(start)) for line in found]


def commands(path: Path) -> list[Command]:
    """The trainer's calls in a header; those of the quickstart stand in its script."""
    if path.parent.name == "tiny":
        cpu = FOLDER / f"{path.stem}_cpu.json"
        return [Command(path, cpu, ranks, ()) for ranks in (1, 2)]
    found = []
    for words in lines_that_start("deepspeed ", path):
        overrides = [word for word in words if "=" in word]
        plain = [word for word in words if "=" not in word]
        options = dict(zip(plain[::2], plain[1::2], strict=True))
        assert options.pop("--module") == "vqrae_ds.train"
        ranks = int(options.pop("--num_nodes", 1)) * int(options.pop("--num_gpus"))
        config, deepspeed = Path(options.pop("--config")), Path(options.pop("--deepspeed_config"))
        assert not options, f"{path}: {options}"
        found.append(Command(config, deepspeed, ranks, tuple(overrides)))
    return found


COMMANDS = [(path, command) for path in RECIPES for command in commands(path)]
IDS = [f"{path}-{command.deepspeed.stem}" for path, command in COMMANDS]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def resolve(command: Command) -> Run:
    """The run of a command on a machine that has neither the data nor the weights."""
    return read_run(
        command.config,
        command.deepspeed,
        overrides=command.overrides,
        world_size=command.ranks,
        check_paths=False,
    )


@functools.cache
def stage_1_by_folder() -> dict[str, Run]:
    """Each run of stage 1 by its output folder."""
    runs = [resolve(commands(path)[0]) for path in RECIPES if path.stem.endswith("stage1")]
    return {run.config.run.output_dir: run for run in runs}


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_is_whole(path: Path) -> None:
    config = check(TrainConfig, read_recipe(path, "--config").values)
    assert resolve_model(config.model).decoder.num_layers
    assert path.stem.endswith(f"stage{config.stage}")
    assert config.run.output_dir.endswith(path.stem)
    text = path.read_text()
    assert text.isascii() and max(map(len, text.split("\n"))) <= 120
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert BASE not in keys[1:], "the base is named before what differs from it"


@pytest.mark.parametrize("path", JSONS, ids=str)
def test_json_of_the_project(path: Path) -> None:
    raw = read_json(path, "--deepspeed_config")
    check_keys(raw)
    assert batch_arithmetic(raw, 1).global_batch == raw["train_batch_size"]
    assert path in {command.deepspeed for _, command in COMMANDS}, "a recipe says what it is for"


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_header_names_its_file(path: Path) -> None:
    assert path in {command.config for command in commands(path)}
    if path.parent.name == "tiny":
        assert QUICKSTART in header(path)


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=IDS)
def test_a_command_resolves(path: Path, command: Command, tmp_path: Path) -> None:
    """With folders where data and weights are expected; stage 2 takes those of its stage 1."""
    config = resolve(command).config
    folders: dict[str, Any] = {"run.output_dir": tmp_path / "run", "data.train": tmp_path}
    folders |= {"data.validation": tmp_path, "losses.perceptual.weights": "null"}
    if config.init.model is not None:
        before = stage_1_by_folder()[config.init.model.removesuffix("_weights")]
        (tmp_path / "config.json").write_text(json.dumps(before.config.model.model_dump()))
        folders["init.model"] = tmp_path
    elif config.init.encoder_weights is not None:
        folders["init.encoder_weights"] = tmp_path
    replaced = tuple(f"{name}={folder}" for name, folder in folders.items())
    run = read_run(
        command.config,
        command.deepspeed,
        overrides=command.overrides + replaced,
        world_size=command.ranks,
    )
    assert run.config.model == config.model
    assert f"stage{config.stage}_" in command.deepspeed.name


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_what_comes_before_is_where_the_recipe_looks(path: Path) -> None:
    init, last = (resolve(commands(path)[n]).config.init for n in (0, -1))
    for arguments in lines_that_start("python tools/import_encoder.py ", path):
        assert arguments[-1] == init.encoder_weights
    for source, out, *rest in lines_that_start("python tools/convert_checkpoint.py ", path):
        assert source in stage_1_by_folder()
        assert (out, rest) == (last.model, ["--to", "stage2"])


def test_runs_do_not_share_a_folder() -> None:
    folders = [read_recipe(path, "--config").values["run"]["output_dir"] for path in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_the_recipes_of_the_paper(name: str) -> None:
    batch, steps, gan_start = OF_THE_PAPER[name]
    run = resolve(commands(FOLDER / f"{name}.yaml")[0])
    losses, params = run.config.losses, run.deepspeed["optimizer"]["params"]
    rate, end = params["lr"], run.deepspeed["scheduler"]["params"]["cos_min_ratio"]
    assert (run.schedule.batch.global_batch, run.schedule.total_steps) == (batch, steps)
    assert (run.config.model.num_embeddings, run.config.model.embedding_dim) == (16384, 1536)
    assert (params["betas"], params["weight_decay"]) == ([0.9, 0.999], 1e-4)
    assert run.deepspeed["scheduler"]["params"]["warmup_num_steps"] == 2000
    assert run.deepspeed["gradient_clipping"] == 1.0 and run.deepspeed["bf16"]["enabled"]
    assert (losses.perceptual.weight, losses.convnext.weight) == (1.0, 0.1)
    if run.config.stage == 1:
        assert (rate, rate * end) == pytest.approx((4e-4, 1e-4))
        assert losses.adversarial is None
        return
    multiplier = run.config.lr_multiplier
    assert (rate, rate * end) == pytest.approx((1e-4, 1e-5))
    assert rate * multiplier.encoder == pytest.approx(1e-5)
    assert rate * multiplier.discriminator == pytest.approx(4e-5)
    assert (losses.adversarial.weight, losses.adversarial.adaptive) == (0.1, False)
    gan = losses.adversarial
    assert gan.first_discriminator_step == gan_start
    assert (gan.discriminator, gan.channels, gan.num_layers) == ("blur_pool", 128, 3)
    assert gan.lecam_weight == 0.001
    assert (losses.distillation.quantized.weight, losses.distillation.teacher.weight) == (0, 1)


def test_the_batch_of_one_gpu_scales_the_learning_rate() -> None:
    for stage in (1, 2):
        many, one = (read_json(FOLDER / f"stage{stage}_{kind}.json", "") for kind in KINDS)
        ratio = one["train_batch_size"] / many["train_batch_size"]
        rates = (raw["optimizer"]["params"]["lr"] for raw in (many, one))
        assert next(rates) * ratio**0.5 == pytest.approx(next(rates))


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name != "tiny"], ids=str)
def test_the_numbers_of_a_header(path: Path) -> None:
    """Tokens and model states are those that the planner computes for the header's commands."""
    from vqrae_ds.planning import GB, peak_bytes, plan, state_bytes

    text = header(path).replace("\n", " ")
    (tokens,) = {int(found) for found in re.findall(r"(\d+) tokens an image", text)}
    states = re.findall(r"Model states: ([\d.]+) GB a GPU on (\d+) GPUs?", text)
    own = [command for command in commands(path) if command.config == path]
    assert len(states) == len(own)
    for size in re.findall(r"([\d.]+) GB in all: predicted", text):  # of the last command
        assert f"{peak_bytes(plan(resolve(own[-1])), own[-1].ranks).total / GB:.1f}" == size
    for (size, gpus), command in zip(states, own, strict=True):
        run = resolve(command)
        assert run.config.model.grid_side**2 == tokens and command.ranks == int(gpus)
        assert f"{sum(state_bytes(plan(run), command.ranks)) / GB:.1f}" == size


@pytest.mark.parametrize("path", [p for p in RECIPES if "TFLOP an" in header(p)], ids=str)
def test_the_work_that_a_header_quotes(path: Path) -> None:
    """TFLOP an image and the hours of a million images to the digit shown, totals within 2 %."""
    text = header(path).replace("\n", " ")
    run = resolve(commands(path)[0])
    tflop = flops_per_image(run) / 1e12
    (quoted,) = re.findall(r"([\d.]+) TFLOP an image", text)
    digits = len(quoted.partition(".")[2])
    assert f"{tflop:.{digits}f}" == quoted
    hours = tflop * 1e6 / (0.40 * 989) / 3600  # a million images on the GPU that headers name
    rates = re.findall(r"([\d.]+) hours a million", text)
    totals = re.findall(r"([\d.]+) M images, .* image: ([\d,]+) hours", text)
    totals += re.findall(r"([\d.]+) million images: ([\d.]+) hours", text)
    assert rates or totals
    for rate in rates:
        assert f"{hours:.{len(rate.partition('.')[2])}f}" == rate
    for millions, total in totals:
        assert float(total.replace(",", "")) == pytest.approx(hours * float(millions), rel=0.02)


def test_every_quoted_work_is_checked() -> None:
    for path in RECIPES:
        assert header(path).count("TFLOP ") == header(path).count("TFLOP an image"), path
