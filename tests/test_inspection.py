"""What the inspection shows of each kind of folder, and its exit status."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch

from tests.conftest import run_python
from tests.test_zero_shards import Payload
from tests.zero_files import seal, write_model_step, write_split_step
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.conversion.inspection import TensorEntry, inspect
from vqrae_ds.conversion.inspection_report import as_text, show_bytes, summarize

TOOL = "tools/inspect_checkpoint.py"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_model_step(run / "checkpoints" / "step_00000020", step=20)
    write_model_step(run / "checkpoints" / "step_00000010", step=10)
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_a_run_is_its_newest_complete_step(run):
    (run / "checkpoints" / "step_00000030").mkdir()
    found = inspect(run, verify=True)
    assert found.folder.name == "step_00000020" and found.damage == []
    facts = {"step": "20", "stage": "1", "world size": "2", "complete": "yes"}
    assert facts.items() <= found.facts.items()
    assert found.facts["generator"] == found.facts["discriminator"] == "ZeRO-3, dp 2 x tp 1"
    counts = {kind: group.count for kind, group in found.files.items()}
    assert counts == {
        "model states": 4,
        "optimizer states": 4,
        "moving averages": 2,
        "random states": 2,
        "descriptions": 4,
    }
    folder = run / "checkpoints" / "step_00000020"
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert sum(group.num_bytes for group in found.files.values()) == written


def test_pretrained_weights_of_the_run_are_told_from_what_else_is_frozen(tmp_path):
    found = inspect(write_split_step(tmp_path / "run"))
    (path,) = (tmp_path / "run" / "frozen").iterdir()
    assert found.facts["pretrained weights"] == f"{path}, {path.stat().st_size:,} bytes"
    assert found.files["frozen weights"].count == 1


def test_the_tensors_are_those_of_the_model(run, tmp_path):
    model = write_model_step(tmp_path / "step_00000005", step=5)
    found = {t.name: t for t in inspect(tmp_path / "step_00000005").tensors if t.engine != "x"}
    for name, tensor in model.state_dict().items():
        entry = found[f"vqrae.{name}"]
        is_buffer, is_frozen = name.startswith("standardize."), name.startswith("encoder.")
        assert entry.shape == tensor.shape
        assert entry.kind == ("buffer" if is_buffer else "frozen" if is_frozen else "trainable")
        assert entry.dtype == ("bfloat16" if is_frozen else "float32")
    assert len(found) == len(model.state_dict()) + 2, "and the discriminator's two"


def test_blocks_that_repeat_are_one_line():
    def entry(name: str, width: int = 3) -> TensorEntry:
        return TensorEntry("generator", name, (width, 2), "float32", "frozen")

    names = [f"encoder.layer.{i}.mlp.{j}.weight" for i in (0, 1, 2, 10) for j in (0, 2)]
    lines = summarize([*map(entry, names), entry("encoder.layer.11.mlp.0.weight", 4)])
    assert [(line.name, line.count) for line in lines] == [
        ("encoder.layer.{0..2,10}.mlp.0.weight", 4),
        ("encoder.layer.{0..2,10}.mlp.2.weight", 4),
        ("encoder.layer.11.mlp.0.weight", 1),
    ]


def test_the_report_adds_up(run):
    found = inspect(run)
    text, every = as_text(found), as_text(found, every_tensor=True)
    assert "vqrae.decoder.blocks.{0..1}.mlp.fc1.weight" in text
    assert "vqrae.decoder.blocks.1.mlp.fc1.weight" in every and "{" not in every
    total = sum(tensor.num_bytes for tensor in found.tensors)
    (line,) = (line for line in text.splitlines() if line.startswith("  all"))
    assert str(len(found.tensors)) in line and line.endswith(show_bytes(total))
    assert f"{sum(tensor.numel for tensor in found.tensors):,}" in line
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1 kB",
        999_400: "999 kB",
        12_345_678: "12.3 MB",
        999_600_000: "1 GB",
        999_600_000_000: "1000 GB",
        6_543 * 10**9: "6543 GB",
    }
    assert {number: show_bytes(number) for number in sizes} == sizes


def test_sizes_are_seen_at_once_and_flips_with_verify(run):
    folder = run / "checkpoints" / "step_00000020"
    path = folder / "generator" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert inspect(folder).damage == []
    (line,) = inspect(folder, verify=True).damage
    assert f"{path.name} does not match its checksum" in line
    path.write_bytes(content[:-1])
    assert f"{path.name} has {len(content) - 1} bytes" in inspect(folder).damage[0]
    path.unlink()
    assert f"{path.name} is missing" in inspect(folder).damage[0]


@pytest.mark.parametrize("kind", ["step", "converted", "foreign"])
def test_a_bar_shows_the_bytes_that_are_checked(run, tmp_path, monkeypatch, kind):
    folder = run / "checkpoints" / "step_00000020"
    if kind == "converted":
        consolidate(folder, tmp_path / "out", to="stage2")
        folder = tmp_path / "out"
    elif kind == "foreign":
        (folder / "manifest.json").unlink()
        folder = folder / "generator"
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        assert inspect(folder, progress=True).damage == []
        assert inspect(folder, verify=True, progress=True).damage == []
        shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    found = re.findall(r"checking: +(\d+)%", shown)
    assert (found[0], found[-1]) == ("0", "100")


def test_a_converted_folder_and_its_damage(run, tmp_path):
    consolidate(run / "checkpoints" / "step_00000020", tmp_path / "out", to="stage2")
    found = inspect(tmp_path / "out", verify=True)
    assert found.damage == [] and found.facts["converted for"] == "stage2"
    names = {t.name for t in inspect(run).tensors}
    assert {t.name for t in found.tensors} == {name.removeprefix("vqrae.") for name in names}
    discriminator = [t for t in found.tensors if t.engine == "discriminator"]
    assert {t.shape for t in discriminator} == {(4, 3), (4,)}
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert any(path.name in line for line in inspect(tmp_path / "out").damage)


def test_a_run_without_a_complete_step_shows_the_newest(run):
    for manifest in run.rglob("manifest.json"):
        manifest.unlink()
    found = inspect(run)
    assert found.folder.name == "step_00000020" and found.facts["complete"] == "no"
    assert "not a complete checkpoint" in found.damage[0]
    assert found.tensors, "what is there is shown"


def test_the_command_line(run, tmp_path):
    done = run_python(TOOL, str(run), "--verify", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["intact"] and found["facts"]["step"] == "20"
    assert sum(t["bytes"] for t in found["tensors"]) == sum(
        t.num_bytes for t in inspect(run).tensors
    )
    (run / "checkpoints" / "step_00000020" / "rng_rank_00001.pt").unlink()
    damaged = run_python(TOOL, str(run))
    assert damaged.returncode == 1 and "DAMAGED" in damaged.stdout
    assert "rng_rank_00001.pt is missing" in damaged.stdout
    for arguments in ([str(tmp_path / "nowhere")], [str(tmp_path / "run"), "--verfy"], []):
        mistaken = run_python(TOOL, *arguments)
        assert (mistaken.returncode, mistaken.stdout) == (2, "")
        assert mistaken.stderr.startswith("error: ") and mistaken.stderr.count("\n") == 1


PICKLES = ["rng_rank_00001.pt", "ema_rank_00000.pt"] + [
    f"{engine}/zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
    for engine in ("generator", "discriminator")
    for kind in ("model", "optim")
]


@pytest.mark.parametrize("name", PICKLES)
def test_code_in_any_file_is_refused_by_every_tool_and_not_run(run, tmp_path, name):
    """The manifest vouches for it: it was written so."""
    folder, trap = run / "checkpoints" / "step_00000020", tmp_path / "trap"
    state = torch.load(folder / name) | {"extra": Payload(os.mkdir, str(trap))}
    torch.save(state, folder / name)
    seal(folder, step=20, world_size=2)
    wanted = f"{Path(name).name} wants to load posix.mkdir, which is not data: refused"
    assert any(wanted in line for line in inspect(folder).damage)
    for ema in (False, True):
        with pytest.raises(ValueError, match=wanted):
            consolidate(folder, tmp_path / "out", to="stage2", ema=ema)
    assert not trap.exists() and not (tmp_path / "out").exists()
    torch.load(folder / name, weights_only=False)
    assert trap.exists(), "the trap must be armed for this test to say anything"


def test_code_in_a_file_of_plain_deepspeed_is_refused_and_not_run(run, tmp_path):
    folder, trap = run / "checkpoints" / "step_00000020" / "generator", tmp_path / "trap"
    (folder.parent / "manifest.json").unlink()
    path = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    torch.save(torch.load(path) | {"extra": Payload(os.mkdir, str(trap))}, path)
    wanted = f"{path.name} wants to load posix.mkdir, which is not data: refused"
    assert any(wanted in line for line in inspect(folder).damage)
    config = folder.parent / "model_config.json"
    with pytest.raises(ValueError, match=wanted):
        consolidate(folder, tmp_path / "out", to="inference", model_config=config)
    assert not trap.exists()
