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
    read_sealed,
    write_manifest,
    write_sealed,
)


def publish(folder: Path, step: int = 3) -> Manifest:
    (folder / "part").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"a" * 1000)
    (folder / "part" / "b.bin").write_bytes(b"b" * 10)
    files = {name: hash_file(folder / name) for name in list_files(folder)}
    manifest = Manifest(step, 1, 2, {"torch": "x"}, files, layout=Layout(dp=2, tp=1))
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
    payload = read_sealed(path)
    assert payload.pop("layout") == {"dp": 2, "tp": 1}
    write_sealed(path, payload)
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
        ('{"format_version": 3, "files": {}, "new": 0}', "format version 3"),
    ],
)
def test_unreadable_manifests(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


def publish_with_frozen(run_folder: Path) -> tuple[Path, Path]:
    """A step folder, and the file in the run that belongs to it."""
    folder = run_folder / "checkpoints" / "step_00000003"
    manifest = publish(folder)
    content = b"frozen" * 100
    record = FileRecord(len(content), xxhash.xxh3_128(content).hexdigest())
    path = run_folder / "frozen" / f"{record.xxh3_128}.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    write_manifest(folder, manifest._replace(frozen=record))
    return folder, path


def test_the_frozen_weights_of_the_run_are_vouched_for_too(tmp_path, monkeypatch):
    folder, path = publish_with_frozen(tmp_path / "run")
    manifest = read_manifest(folder)
    assert find_damage(folder, manifest) == []
    monkeypatch.chdir(folder.parent)
    link = tmp_path / "elsewhere"
    link.symlink_to(folder)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    for name in (folder, Path(folder.name), link):
        assert find_damage(name, manifest) == [f"{path} does not match its checksum"]
        assert find_damage(name, manifest, checksums=False) == []
    path.write_bytes(content + b"!")
    assert find_damage(folder, manifest) == [f"{path} has 601 bytes, the manifest says 600"]
    path.unlink()
    assert find_damage(folder, manifest) == [
        f"{path} is missing: the folder frozen/ of a run belongs to its checkpoints, "
        "keep and copy it with them"
    ]


@pytest.mark.parametrize("digest", ["../../secret", "", 3, "A" * 32, "0" * 31])
def test_a_record_that_would_lead_elsewhere_is_refused(tmp_path, digest):
    folder, _ = publish_with_frozen(tmp_path / "run")
    payload = read_sealed(folder / "manifest.json")
    payload["frozen"]["xxh3_128"] = digest
    write_sealed(folder / "manifest.json", payload)
    with pytest.raises(ValueError, match="not a readable manifest"):
        read_manifest(folder)


def test_the_first_format_is_read_still(tmp_path):
    manifest = publish(tmp_path / "x")
    payload = read_sealed(tmp_path / "x" / "manifest.json")
    del payload["frozen"]
    payload["format_version"] = 1
    (tmp_path / "x" / "manifest.json").write_text(json.dumps(payload))
    assert read_manifest(tmp_path / "x") == manifest


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


def test_a_sealed_file_is_read_as_it_was_written_and_in_no_other_way(tmp_path):
    path = tmp_path / "sealed.json"
    payload = {"text": "a \u00e9", "numbers": [1, 0.1 + 0.2, None], "inner": {"b": True}}
    write_sealed(path, payload)
    assert read_sealed(path) == payload
    intact = path.read_bytes()
    for place in range(len(intact)):
        for bit in range(8):
            flipped = bytes([intact[place] ^ (1 << bit)])
            path.write_bytes(intact[:place] + flipped + intact[place + 1 :])
            try:
                found = read_sealed(path)
            except ValueError as error:
                assert "sealed.json" in str(error)
            else:  # its key is another name now, which no reader of an object takes
                assert found.keys() - payload.keys(), (place, bit)
        path.write_bytes(intact[:place])
        with pytest.raises(ValueError, match="sealed.json"):
            read_sealed(path)


def test_an_unsealed_manifest_of_an_earlier_version_is_read(tmp_path):
    manifest = publish(tmp_path / "x")
    path = tmp_path / "x" / "manifest.json"
    payload = json.loads(path.read_text())
    del payload["seal_xxh3_128"]
    path.write_text(json.dumps(payload))
    assert read_manifest(tmp_path / "x") == manifest
