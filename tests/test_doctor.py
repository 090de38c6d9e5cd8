"""The doctor on this machine: its exit statuses, its table, what it says of a connection."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.config_files import write_files
from tests.conftest import ROOT, run_python
from vqrae_ds.config import read_run
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.launching import connections
from vqrae_ds.launching.checks import Report, judge
from vqrae_ds.launching.connections import command_for, explain_failure
from vqrae_ds.launching.doctor import ENOUGH_SECONDS, look, look_before_launch
from vqrae_ds.launching.hosts import Host
from vqrae_ds.launching.needs import REQUIREMENTS, Needs, needs_of
from vqrae_ds.launching.table import broken, is_sound, note, ok, render

PHOTOGRAPHS = ROOT / "tests/data/photos"


@pytest.fixture
def run_files(tmp_path: Path) -> Path:
    """A folder with all that a run needs."""
    write_shards(
        find_images(PHOTOGRAPHS), tmp_path / "shards", samples_per_shard=20, root=PHOTOGRAPHS
    )
    (tmp_path / "lpips.safetensors").write_bytes(b"not looked into")
    weights = f"losses.perceptual.weights={tmp_path}/lpips.safetensors"
    write_files(tmp_path, f"data.train={tmp_path}/shards", weights)
    return tmp_path


def doctor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = ("--config", f"{folder}/config.yaml", "--deepspeed_config", f"{folder}/deepspeed.json")
    return run_python("-m", "vqrae_ds.launching.doctor", *files, *arguments)


def test_a_sound_machine(run_files: Path) -> None:
    done = doctor(run_files, "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    head, row = done.stdout.splitlines()[:2]
    assert head.split()[:5] == ["node", "reachable", "python", "packages", "code"]
    assert row.startswith("localhost  ok")
    assert not (run_files / "out").exists(), "the run's folder was made for the check alone"


def test_faults_are_named_below_the_table(run_files: Path) -> None:
    (run_files / "shards" / "000001.tar").unlink()
    (run_files / "lpips.safetensors").unlink()
    done = doctor(run_files, "--local", f"init.encoder_weights={run_files}/nowhere")
    assert done.returncode == 1, done.stdout + done.stderr
    found = dict(
        line.removeprefix("localhost  ").split(": ", 1)
        for line in done.stdout.splitlines()
        if line.startswith("localhost  ") and ": " in line
    )
    assert set(found) == {"data", "weights"}
    assert f"{run_files}/shards/000001.tar is missing" in found["data"]
    assert (
        f"init.encoder_weights: {run_files}/nowhere/model.safetensors is missing"
        in found["weights"]
    )
    assert (
        f"losses.perceptual.weights: {run_files}/lpips.safetensors is missing" in found["weights"]
    )


def test_a_folder_of_images_has_its_way_out(run_files: Path) -> None:
    (run_files / "shards" / "index.json").unlink()
    done = doctor(run_files, "--local")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"data: {run_files}/shards/index.json is missing: " in done.stdout
    assert "by `python tools/make_shards.py IMAGES OUT`" in done.stdout


def test_the_packages_are_those_that_the_project_requires(run_files: Path) -> None:
    asked = needs_for(run_files, "config.yaml").details(0, 1, "token")["packages"]
    assert {"torch", "deepspeed", "safetensors", "PyYAML", "vector-quantize-pytorch"} < set(asked)
    lines = REQUIREMENTS.read_text().splitlines()[1:]
    assert asked == [*(Requirement(line.split("#")[0]).name for line in lines), "vqrae_ds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --hostfile --slurm --local is required"),
        (["--local", "--slurm"], "not allowed with argument"),
        (["--hostfile", "nowhere"], "hostfile nowhere is not a file"),
        (["--local", "run.total_step=1"], "run.total_steps"),
        (["--local", "--seconds", "4"], "the nodes have 4 s to answer: 5 or more"),
        (["--local", "--master_port", "70000"], "--master_port 70000 is not a port"),
    ],
)
def test_mistakes_are_one_line(run_files: Path, arguments: list[str], message: str) -> None:
    done = doctor(run_files, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_no_torch_is_imported() -> None:
    listed = "import sys, vqrae_ds.launching.doctor; print(*sys.modules)"
    modules = run_python("-c", listed).stdout.split()
    assert "vqrae_ds.launching.checks" in modules
    assert not {"torch", "deepspeed", "transformers", "numpy"} & set(modules)


def test_a_table() -> None:
    columns = {
        "port": [ok("29500"), ok("29500"), ok("29500")],
        "disk": [broken("full:\n make room"), broken("full: make room"), ok()],
        "gpus": [ok("8"), ok("8"), note("4/8", "4 of its GPUs get no rank")],
    }
    assert not is_sound(columns)
    assert is_sound({"gpus": columns["gpus"]})
    assert render(["n1", "n2", "n3"], columns) == (
        "node  port   disk    gpus\n"
        "n1    29500  BROKEN  8\n"
        "n2    29500  BROKEN  8\n"
        "n3    29500  ok      4/8\n"
        "\n"
        "note: n3  gpus: 4 of its GPUs get no rank\n"
        "n1, n2  disk: full: make room"
    )
    many = [f"n{i}" for i in range(9)]
    assert render(many, {"disk": [broken("full")] * 9}).endswith(
        "n0, n1, n2 and 6 more  disk: full"
    )


def test_the_remote_shell_gets_one_word_for_one(tmp_path: Path) -> None:
    """What ssh joins with blanks comes apart again as it was."""
    command = command_for("n1", "ssh")
    assert command[-2] == "n1" and command[-3] == "--"
    assert "BatchMode=yes" in command and "ConnectTimeout=5" in command
    assert shlex.split(command[-1]) == command_for("n1", "local")
    assert command_for("n1", "srun")[-4:] == command_for("n1", "local")


@pytest.mark.parametrize(
    ("said", "status", "meaning"),
    [
        ("Host key verification failed.", 255, "not known here"),
        ("@@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\n"
         "Host key verification failed.", 255, "another than the one in known_hosts"),
        ("root@n1: Permission denied (publickey).", 255, "refuses our key"),
        ("ssh: Could not resolve hostname n1: Name or service not known", 255, "no address"),
        ("ssh: connect to host n1 port 22: Connection refused", 255, "start sshd"),
        ("ssh: connect to host n1 port 22: Connection timed out", 255, "dead or cut off"),
        ("ssh: connect to host n1 port 22: No route to host", 255, "dead or cut off"),
        ("bash: line 1: /x/python: No such file or directory", 127, "Install the environment"),
        ("kex_exchange_identification: Connection reset", 255, "kex_exchange_identification"),
        ("", 1, "exit status 1"),
    ],
)  # fmt: skip
def test_what_ssh_says_is_explained(said: str, status: int, meaning: str) -> None:
    line = explain_failure("n1", "ssh", status, said)
    assert meaning in line and "\n" not in line


def test_what_a_run_needs(run_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_TOKEN", "secret")
    (run_files / "late.yaml").write_text("base: config.yaml\nrun: {seed: 1}\n")
    needs = needs_for(
        run_files, "late.yaml", "data.validation=val", "losses.perceptual.weights=null"
    )
    names = {Path(path).name for path in needs.config}
    assert names == {"late.yaml", "config.yaml", "deepspeed.json"} | {"config.json"}
    assert all(Path(path).is_absolute() for path in [*needs.config, *needs.data.values()])
    assert needs.data["data.validation"] == str(Path("val").absolute())
    assert [(w["path"], w["cached"]) for w in needs.weights] == [(None, "vgg16-397923af.pth")]
    assert "secret" not in json.dumps(needs.details(0, 1, "token"))
    assert needs.details(0, 2, "")["port"] == 29500 and needs.details(1, 2, "")["port"] is None


def needs_for(folder: Path, config: str, *overrides: str) -> Needs:
    files = (folder / config, folder / "deepspeed.json")
    run = read_run(*files, overrides=overrides, check_paths=False)
    return needs_of(run, *files, overrides, 29500)


def test_the_majority_is_right(run_files: Path) -> None:
    """Of three nodes the first has another torch, the last too few GPUs and a clock behind."""
    needs = needs_for(run_files, "config.yaml")._replace(uses_gpus=True)
    reports = [report(f"n{i}", torch="2.9" if i == 1 else "2.10", gpus=9 - i) for i in (1, 2, 3)]
    reports[2] = reports[2]._replace(ahead=-7.5, host=Host("n3", 8))
    columns = judge(reports, needs)
    broken_cells = {
        (node, name): cell.detail
        for name, cells in columns.items()
        for node, cell in enumerate(cells, start=1)
        if cell.state == "broken"
    }
    assert set(broken_cells) == {(1, "packages"), (3, "gpus"), (3, "clock")}
    assert broken_cells[1, "packages"].startswith("torch 2.9, but 2.10 on n2")
    assert broken_cells[3, "gpus"].startswith("8 slots, but 6 GPUs")
    assert broken_cells[3, "clock"].startswith("its clock is 7.5 s behind that of n1")


def test_disk_for_what_is_still_to_come(run_files: Path) -> None:
    """Those that are there take no more, nor do frozen weights that are written once a run."""
    needs = needs_for(run_files, "config.yaml")
    needs = needs._replace(
        checkpoint_bytes=10 * 10**9, most_checkpoints=4, pretrained_bytes=5 * 10**9
    )

    def state(free: float, checkpoints: int, size: float | None, has_frozen: bool) -> str:
        disk = {"free": free * 1e9, "checkpoints": checkpoints, "size": size and size * 1e9}
        facts = report("n1").facts | {"disk": {"value": {**disk, "has_frozen": has_frozen}}}
        return judge([report("n1")._replace(facts=facts)], needs)["disk"][0].state

    assert [state(44.9, 0, None, False), state(45, 0, None, False)] == ["broken", "ok"]
    assert [state(19.9, 2, 10, True), state(20, 2, 10, True)] == ["broken", "ok"]
    assert [state(11.9, 3, 12, True), state(12, 3, 12, True)] == ["broken", "ok"]
    assert state(0, 4, 12, True) == "ok", "a run that has saved all that it will"


def test_number_of_checkpoints_and_a_node_s_own_disk(run_files: Path, tmp_path: Path) -> None:
    """As the trainer counts: the next one beside the last, those for ever, no more than steps."""
    every = ("checkpoint.every_steps=20", "checkpoint.keep_last=3", "run.total_steps")
    for steps, more, number in ((100, [], 4), (60, [], 3), (100, ["checkpoint.keep_every=40"], 6)):
        needs = needs_for(run_files, "config.yaml", *every[:2], f"{every[2]}={steps}", *more)
        assert needs.most_checkpoints == number
    needs = needs_for(run_files, "config.yaml", f"checkpoint.local_dir={tmp_path}/own")
    assert needs.local_dir == f"{tmp_path}/own"
    needs = needs._replace(checkpoint_bytes=10 * 10**9)
    facts = [report(f"n{i}").facts | {"local": {"value": 4e9}} for i in (1, 2)]
    hosts = [Host("n1", 1), Host("n2", 3)]
    reports = [Report(host, fact) for host, fact in zip(hosts, facts, strict=True)]
    cells = judge(reports, needs)["local disk"]
    assert [cell.state for cell in cells] == ["ok", "broken"]
    assert "its share of a checkpoint has 7.5 GB" in cells[1].detail


def report(name: str, torch: str = "2.10", gpus: int = 8) -> Report:
    """What the probe says of a node on which all is well."""
    facts = {
        "python": "3.11.7",
        "packages": {"torch": torch, "vqrae_ds": None},
        "code": {"folder": "/x/vqrae_ds", "digest": "d"},
        "config": {},
        "gpus": gpus,
        "run folder": True,
        "disk": {"free": 1e15, "checkpoints": 0, "size": None, "has_frozen": False},
        "weights": [],
        "data.train": {"shards": 1, "mine": 1, "checked": 1, "faults": []},
    }
    return Report(Host(name, 2), {fact: {"value": value} for fact, value in facts.items()})


def test_a_slow_node_has_the_time_that_it_is_given(
    run_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its interpreter takes 3 s to start, as one on a busy file server does."""
    slow = run_files / "python"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {sys.executable} "$@"\n')
    slow.chmod(0o700)
    monkeypatch.setattr(connections, "node_python", lambda way: str(slow))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    needs, hosts = needs_for(run_files, "config.yaml")._replace(port=None), [Host("here", 0)]
    assert not look(hosts, "local", needs, seconds=5)
    assert "here  reachable: no answer within 2.5 s" in capsys.readouterr().out
    monkeypatch.setenv("DOCTOR_SECONDS", "20")
    assert look_before_launch(hosts, "local", needs), capsys.readouterr().out


@pytest.mark.parametrize(
    ("slept", "given", "least", "most"),
    [
        (1, 10, ENOUGH_SECONDS, 9.01),
        (3, 10, ENOUGH_SECONDS, ENOUGH_SECONDS),
        (1, 30, 20, 29.01),
        (1, 6, 6, 6),
    ],
)
def test_a_slow_start_leaves_the_nodes_less_but_enough(
    slept: float, given: float, least: float, most: float
) -> None:
    """The process has begun as the shell that sleeps, like one that waits for its files."""
    code = f"from vqrae_ds.launching.doctor import left_after_start as left; print(left({given}))"
    script = f"sleep {slept}; exec {shlex.join([sys.executable, '-c', code])}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert least <= float(done.stdout) <= most


def test_the_script(run_files: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [ROOT / "launchers/doctor", "--help"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--hostfile" in done.stdout, done.stderr
    assert time.monotonic() - began < 10
