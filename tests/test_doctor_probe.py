"""The probe: what it finds on this machine, over the same conversation as with a node."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from vqrae_ds.launching import probe
from vqrae_ds.launching.connections import NodeLost, connect, probe_text


def ask(*questions: tuple[str, float, dict[str, Any]]) -> list[Any]:
    """The answers of one probe in a process of its own."""

    async def talk() -> list[Any]:
        connection = await connect("here", "local", probe_text())
        answers = [await connection.ask(what, seconds, **more) for what, seconds, more in questions]
        await connection.close()
        return answers

    return asyncio.run(talk())


def details(folder: Path, **changes: Any) -> dict[str, Any]:
    nothing = {"data": {}, "weights": [], "config": [], "devices": False, "port": None}
    return {
        **nothing,
        "folder": str(ROOT),
        "search": [str(ROOT)],
        "environment": {},
        "package": "vqrae_ds",
        "packages": ["pytest", "no-such-package"],
        "run_folder": str(folder / "run"),
        "token": ".token",
        "share": {"rank": 0, "nodes": 1},
        **changes,
    }


def write_index(folder: Path, sizes: dict[str, int]) -> None:
    folder.mkdir()
    shards = [{"file": name, "size": size} for name, size in sizes.items()]
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


def test_the_probe_needs_the_standard_library_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(probe_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported <= set(sys.stdlib_module_names)


def test_facts_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (answer,) = ask(("inspect", 20, details(tmp_path, config=[str(ROOT / "LICENSE")])))
    facts = {name: found.get("value", found) for name, found in answer.items()}
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"] == {"pytest": pytest.__version__, "no-such-package": None}
    assert facts["code"]["folder"] == str(ROOT / "vqrae_ds")
    assert facts["run folder"] is True and facts["disk"]["checkpoints"] == 0
    assert not (tmp_path / "run").exists(), "what was made is removed"


def test_a_revision_is_names_and_bytes(tmp_path: Path) -> None:
    def digest() -> str:
        return probe.digest(sorted(map(str, tmp_path.rglob("*.py"))), str(tmp_path))

    (tmp_path / "a.py").write_text("x = 1\n")
    first = digest()
    (tmp_path / "a.py").touch()
    assert digest() == first, "times do not count"
    (tmp_path / "a.py").write_text("x = 2\n")
    second = digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, digest()}) == 3


def test_tokens_of_other_nodes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "theirs").write_text("theirs")
    (tmp_path / "run" / "stale").write_text("of an earlier time")
    tokens = [".token", "theirs", "stale", "absent"]
    folder = str(tmp_path / "run")
    inspected, seen = ask(
        ("inspect", 20, details(tmp_path)), ("read", 20, {"folder": folder, "tokens": tokens})
    )
    assert inspected["run folder"] == {"value": True}
    assert seen == {"value": {".token": True, "theirs": True, "stale": False, "absent": False}}
    assert sorted(os.listdir(tmp_path / "run")) == ["stale", "theirs"]


def test_shards_are_looked_at_by_one_node_or_shared_out(tmp_path: Path) -> None:
    write_index(tmp_path / "few", {"0.tar": 3, "1.tar": 3, "2.tar": 3})
    (tmp_path / "few" / "0.tar").write_bytes(b"123")
    (tmp_path / "few" / "1.tar").write_bytes(b"12")
    found = probe.shards(str(tmp_path / "few"), rank=1, nodes=2)
    wrong = [["1.tar", "has 2 bytes, the index says 3"], ["2.tar", "is missing"]]
    assert found["faults"] == wrong
    assert (found["shards"], found["mine"], found["checked"]) == (3, 3, 3)

    (tmp_path / "photos").mkdir()
    assert probe.shards(str(tmp_path / "photos"), 0, 1)["faults"] == [["index.json", "is missing"]]

    names = [f"{i:05d}.tar" for i in range(probe.MANY_SHARDS + 1)]
    write_index(tmp_path / "many", dict.fromkeys(names, 1))
    shares = [probe.shards(str(tmp_path / "many"), rank, nodes=3) for rank in range(3)]
    missing = [name for share in shares for name, _ in share["faults"]]
    assert sorted(missing) == names, "each by one node"


def test_weights_and_first_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "encoder"
    folder.mkdir()
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "one.safetensors").touch()
    encoder = {"setting": "init.encoder_weights", "path": str(folder), "kind": "weights"}
    cached = {"setting": "lpips", "path": None, "cached": "vgg.pth", "kind": "file"}
    wanted = [{**encoder, "is_first": True}, {**cached, "is_first": False}]
    lpips = ["lpips", str(tmp_path / "cache/hub/checkpoints/vgg.pth"), "is missing"]
    first = ["init.encoder_weights", str(folder / "two.safetensors"), "is missing"]

    run = tmp_path / "run"
    assert probe.faulty_weights(str(run), wanted) == [first, lpips]
    (folder / "two.safetensors").touch()
    assert probe.faulty_weights(str(run), wanted) == [lpips]
    (folder / "two.safetensors").unlink()
    (run / "checkpoints/step_00000010").mkdir(parents=True)
    files = {"files": {"a": {"size": 7}, "b": {"size": 5}}}
    (run / "checkpoints/step_00000010/manifest.json").write_text(json.dumps(files))
    assert probe.faulty_weights(str(run), wanted) == [lpips], "a run that resumes needs no first"
    found = probe.disk(str(run))
    assert (found["checkpoints"], found["size"]) == (1, 12) and found["free"] > 0


def test_what_is_there_but_not_for_this_user(tmp_path: Path) -> None:
    """Permissions hold for others than root alone: root asks as nobody."""
    write_index(tmp_path / "shards", {"0.tar": 1, "1.tar": 1})
    for path in [tmp_path / "shards/0.tar", tmp_path / "shards/1.tar", tmp_path / "vgg.pth"]:
        path.write_bytes(b"1")
        path.chmod(0o000 if path.name != "0.tar" else 0o444)
    weights = [{"setting": "lpips", "path": str(tmp_path / "vgg.pth"), "kind": "file"}]
    code = (
        "import json, sys; exec(sys.stdin.read()); weights = json.loads(sys.argv[2]); "
        "print(json.dumps([shards(sys.argv[1], 0, 1), faulty_weights('/x', weights)]))"
    )
    listed = json.dumps([{**entry, "is_first": False} for entry in weights])
    command = [sys.executable, "-c", code, str(tmp_path / "shards"), listed]
    if os.geteuid() == 0:
        # Folders of pytest are their user's alone.
        command = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", *command]
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    text = probe_text().partition("if __name__")[0]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards, found = json.loads(done.stdout)
    assert shards["faults"] == [["1.tar", "cannot be read by this user (chmod a+r)"]]
    assert found == [
        ["lpips", str(tmp_path / "vgg.pth"), "cannot be read by this user (chmod a+r)"]
    ]


def test_a_node_s_own_disk(tmp_path: Path) -> None:
    local = str(tmp_path / "own" / "disk")
    (answer,) = ask(("inspect", 20, details(tmp_path, local_dir=local)))
    assert answer["local"]["value"] == pytest.approx(probe.free_bytes(str(tmp_path)), rel=0.5)
    assert not (tmp_path / "own").exists(), "what was made is removed"
    (tmp_path / "file").touch()
    (answer,) = ask(("inspect", 20, details(tmp_path, local_dir=f"{tmp_path}/file/disk")))
    assert "error" in answer["local"]


def test_what_hangs_or_fails_is_told_apart() -> None:
    began = time.monotonic()

    def fail() -> None:
        raise ValueError("no")

    checks = {"late": lambda: time.sleep(60), "fails": fail, "works": lambda: 1}
    checks["absent"] = Path("/nowhere/file").read_text
    found = probe.within(0.5, checks)
    assert time.monotonic() - began < 5
    assert found == {
        "late": {"late": 0.5},
        "fails": {"error": "ValueError: no"},
        "works": {"value": 1},
        "absent": {"error": "/nowhere/file: No such file or directory"},
    }


def test_a_port_in_use() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not probe.is_free(port)
    assert probe.is_free(port)


def test_gpus_by_what_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    lines = [f"GPU {i}: NVIDIA A100-SXM4-80GB (UUID: GPU-{i})" for i in range(4)]
    lines.insert(1, "  MIG 1g.10gb     Device  0: (UUID: MIG-0)")
    tool.write_text("#!/bin/sh\ncat <<E\n" + "\n".join(lines) + "\nE\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe.devices() == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert probe.devices() == 2
    tool.write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library mismatch'; exit 9\n"
    )
    with pytest.raises(OSError, match="Failed to initialize NVML"):
        probe.devices()


def test_an_answer_that_does_not_come() -> None:
    """The probe is told to wait longer than it is waited for."""

    async def talk() -> None:
        connection = await connect("here", "local", "import time; time.sleep(60)")
        try:
            with pytest.raises(NodeLost, match="no answer within 0.5 s"):
                await connection.ask("clock", 0.5)
        finally:
            await connection.close()

    began = time.monotonic()
    asyncio.run(talk())
    assert time.monotonic() - began < 5


def test_a_node_that_fails_says_why() -> None:
    async def talk() -> None:
        connection = await connect("here", "local", "raise OSError('out of memory')")
        with pytest.raises(NodeLost, match="local ended with status 1: OSError: out of memory"):
            await connection.ask("clock", 10)
        await connection.close()

    asyncio.run(talk())
