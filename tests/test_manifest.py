"""The manifest: written last, read back, and what it says of a damaged folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from vqrae_ds.manifest import (
    FileRecord,
    Layout,
    Manifest,
    complete_steps,
    find_damage,
    hash_file,
    list_files,
    read_manifest,
    write_manifest,
)


def publish(folder: Path, step: int = 3) -> Manifest:
    (folder / "part").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"a" * 1000)
    (folder / "part" / "b.bin").write_bytes(b"b" * 10)
    files = {name: hash_file(folder / name) for name in list_files(folder)}
    manifest = Manifest(step, 1, 2, {"torch": "x"}, files, Layout(dp=2, tp=1))
    write_manifest(folder, manifest)
    return manifest


def test_round_trip(tmp_path):
    manifest = publish(tmp_path / "step_00000003")
    assert read_manifest(tmp_path / "step_00000003") == manifest
    assert set(manifest.files) == {"a.bin", "part/b.bin"}
    digest = xxhash.xxh3_128(b"a" * 1000).hexdigest()
    assert manifest.files["a.bin"] == FileRecord(1000, digest)
    assert find_damage(tmp_path / "step_00000003", manifest) == []


def test_a_layout_that_an_earlier_version_did_not_state(tmp_path):
    manifest = publish(tmp_path)
    path = tmp_path / "manifest.json"
    payload = json.loads(path.read_text())
    assert payload.pop("layout") == {"dp": 2, "tp": 1}
    path.write_text(json.dumps(payload))
    assert read_manifest(tmp_path) == manifest


def test_each_damage_is_named(tmp_path):
    manifest = publish(tmp_path / "x")
    (tmp_path / "x" / "part" / "b.bin").unlink()
    content = bytearray((tmp_path / "x" / "a.bin").read_bytes())
    content[500] ^= 1
    (tmp_path / "x" / "a.bin").write_bytes(content)
    assert find_damage(tmp_path / "x", manifest) == [
        "a.bin does not match its checksum",
        "part/b.bin is missing",
    ]
    assert find_damage(tmp_path / "x", manifest, checksums=False) == ["part/b.bin is missing"]
    (tmp_path / "x" / "a.bin").write_bytes(content[:-1])
    assert find_damage(tmp_path / "x", manifest)[0] == "a.bin has 999 bytes, the manifest says 1000"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a complete checkpoint"),
        ("{", "not a readable manifest"),
        ("[]", "not a readable manifest"),
        ('{"format_version": 1, "files": {}}', "not a readable manifest"),
        ('{"format_version": 2, "files": {}, "new": 0}', "format version 2"),
    ],
)
def test_unreadable_manifests(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


def test_complete_steps_are_newest_first_and_the_others_do_not_exist(tmp_path, caplog):
    for step in (2, 10, 9):
        publish(tmp_path / f"step_{step:08d}", step)
    (tmp_path / "step_00000011").mkdir()
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_00000009" / "manifest.json").write_text(json.dumps({}))
    steps = [folder.name for folder in complete_steps(tmp_path)]
    assert steps == ["step_00000010", "step_00000002"]
    assert "step_00000011" in caplog.text and "step_00000009" in caplog.text
    assert complete_steps(tmp_path / "nothing") == []
