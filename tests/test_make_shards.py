"""Making shards: what is written, and how the command line ends when it is used wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from tests.conftest import run_python
from vqrae_ds.command_line import run_tool
from vqrae_ds.data import shard_writing
from vqrae_ds.data.index import INDEX_NAME, SAMPLES_NAME, ShardIndex, read_index
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.manifest import hash_file

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "tests" / "data" / "photos"


def make_shards(*arguments: str | Path) -> subprocess.CompletedProcess:
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
    )


def list_keys(index: ShardIndex) -> list[str]:
    return [index.sample(i).key for i in range(index.num_samples)]


def test_written_shards_hold_the_original_bytes(tmp_path: Path) -> None:
    photos = find_images(PHOTOS)
    index = write_shards(photos, tmp_path / "shards", samples_per_shard=10, root=PHOTOS)

    assert [shard.num_samples for shard in index.shards] == [9, 9, 9, 9, 9]
    found = {}
    for i in range(index.num_samples):
        sample = index.sample(i)
        found[sample.key] = sample.shard.read_bytes()[sample.offset :][: sample.length]
    assert found == {f"{photo.parent.name}/{photo.stem}": photo.read_bytes() for photo in photos}
    for shard in index.shards:
        assert hash_file(tmp_path / "shards" / shard.file) == (shard.size, shard.xxh3_128)


def test_written_shards_are_webdataset_shards(tmp_path: Path) -> None:
    index = write_shards(find_images(PHOTOS / "val"), tmp_path, samples_per_shard=100, root=PHOTOS)
    reader = webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False)
    theirs = {sample["__key__"]: sample["webp"] for sample in reader}
    assert list(theirs) == list_keys(index)
    assert all(theirs[f"val/{p.stem}"] == p.read_bytes() for p in find_images(PHOTOS / "val"))


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    photos = find_images(PHOTOS / "val")
    for name, images in (("a", photos), ("b", photos[::-1])):
        write_shards(images, tmp_path / name, samples_per_shard=3, root=PHOTOS)
        for shard in (tmp_path / name).glob("*.tar"):
            os.utime(shard, (1, 1))  # the index keeps it
        index_shards(tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000000.tar", "000001.tar", "000002.tar", INDEX_NAME, SAMPLES_NAME]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_class_a_folder_is_spread_over_the_shards(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(b"x")
    index = write_shards(
        find_images(tmp_path), tmp_path / "out", samples_per_shard=4, root=tmp_path
    )
    for number in range(2):
        keys = index.samples_of(number).keys
        assert [key.split("/")[0] for key in keys] == ["cat", "cat", "dog", "dog"]


def test_keys_of_awkward_file_names(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90) / ("e" * 90) / "f.g"
    deep.mkdir(parents=True)
    names = {
        "my.summer.photo.JPG": "my_summer_photo",
        "Größe 猫.png": "Größe 猫",
        "x" * 150 + ".webp": "x" * 150,
    }
    for name in names:
        (deep / name).write_bytes(b"data of " + name.encode())
    images = find_images(tmp_path)
    index = write_shards(images, tmp_path / "out", samples_per_shard=9, root=tmp_path)
    folder = deep.relative_to(tmp_path).as_posix()
    assert set(list_keys(index)) == {f"{folder}/{key}" for key in names.values()}
    assert set(index.samples_of(0).extensions) == {0, 2, 3}, "jpg, png, webp"
    assert list_keys(read_index(tmp_path / "out")) == list_keys(index)
    reader = webdataset.WebDataset(str(tmp_path / "out/000000.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in reader] == list_keys(index)


def test_two_images_that_share_a_key_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("a.b.jpg", "a_b.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.b\.jpg and .*a_b\.png share the key 'a_b'"):
        write_shards(find_images(tmp_path), tmp_path / "out", samples_per_shard=9, root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_write_shards_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    photos = find_images(PHOTOS / "val")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for output, images, samples_per_shard, message in [
        (tmp_path / "full", photos, 5, "not an empty folder"),
        (tmp_path / "full" / "file", photos, 5, "not an empty folder"),
        (tmp_path / "new", [], 5, "no image"),
        (tmp_path / "new", photos, 0, "at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_shards(images, output, samples_per_shard=samples_per_shard, root=PHOTOS)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_write_leaves_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard = shard_writing._write_shard

    def fail_at_the_second(path: Path, entries: list) -> None:
        if path.name == "000001.tar":
            raise OSError("disk full")
        write_shard(path, entries)

    monkeypatch.setattr(shard_writing, "_write_shard", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        write_shards(find_images(PHOTOS / "val"), tmp_path, samples_per_shard=3, root=PHOTOS)
    assert [p.name for p in tmp_path.iterdir()] == ["000000.tar"]
    with pytest.raises(ValueError, match="no index.json.*make_shards.py --index-only"):
        read_index(tmp_path)


def test_bad_pictures_are_refused_or_left_out_by_kind(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("one", "two", "three"):
        Image.new("RGB", (64, 64), "teal").save(images / f"{name}.jpg")
    for name in ("cut1", "cut2"):
        (images / f"{name}.jpg").write_bytes((images / "one.jpg").read_bytes()[:-300])
    (images / "empty.png").touch()
    (images / "page.webp").write_text("<html>not found</html>")
    refused = make_shards(images, out)
    assert refused.returncode == 2 and not out.exists()
    assert "and 1 more" in refused.stderr and "--skip-bad" in refused.stderr

    made = make_shards(images, out, "--skip-bad")
    assert (made.returncode, made.stderr) == (0, "")
    first, *left_out = made.stdout.splitlines()
    assert first == f"{out}: 3 images in 1 shard"
    assert list_keys(read_index(out)) == ["one", "three", "two"]
    starts = [("2 x corrupt", "cut1.jpg"), ("1 x empty", "empty.png")]
    starts += [("1 x not_an_image", "page.webp")]
    assert len(left_out) == len(starts)
    for line, (number, name) in zip(left_out, starts, strict=True):
        assert line.startswith(f"left out: {number}, the first {images / name}: ")


def test_files_of_other_types_are_counted(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(images / "ok.JPG", "JPEG")
    for name in ("ok.gif", "sub/ok2.HEIC", "sub/ok3.heic", ".DS_Store", "LICENSE", "notes.txt"):
        (images / name).touch()
    made = make_shards(images, tmp_path / "out")
    expected = "passed over: 2 .heic, 1 .DS_Store, 1 .gif, 1 .txt, 1 other"
    types = "(taken are jpg, jpeg, png, webp)"
    assert made.stdout == f"{tmp_path / 'out'}: 1 image in 1 shard; {expected} {types}\n"
    for number in range(9):
        (images / f"{number}.x{number}").touch()
    again = make_shards(images, tmp_path / "again")
    assert ", 1 .txt, 1 .x0, " in again.stdout and again.stdout.count("\n") == 1
    assert "1 .x3, 6 of other types (taken are" in again.stdout


def test_images_to_shards_and_index_again(tmp_path: Path) -> None:
    made = make_shards(PHOTOS, "--samples-per-shard", "20", tmp_path / "new" / "shards")
    assert (made.returncode, made.stderr) == (0, "")
    assert "45 images in 3 shards" in made.stdout
    assert read_index(tmp_path / "new" / "shards").num_samples == 45

    index = tmp_path / "new" / "shards" / INDEX_NAME
    written = index.read_bytes()
    index.unlink()
    indexed = make_shards("--index-only", tmp_path / "new" / "shards")
    assert (indexed.returncode, indexed.stderr) == (0, "")
    assert index.read_bytes() == written


def test_verify_names_what_is_not_as_it_was_indexed(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(find_images(PHOTOS / "val"), folder, samples_per_shard=2, root=PHOTOS)
    sound = make_shards("--verify", folder, "--processes", "2")
    assert (sound.returncode, sound.stderr) == (0, "")
    assert "every shard is what was indexed" in sound.stdout
    before = {path: path.read_bytes() for path in folder.iterdir()}
    altered, gone = folder / "000001.tar", folder / "000002.tar"
    data = bytearray(before[altered])
    data[5000] ^= 1
    altered.write_bytes(data)
    os.utime(altered, ns=(1, altered.stat().st_mtime_ns))
    gone.unlink()
    found = make_shards("--verify", folder, "--processes", "2")
    assert (found.returncode, found.stderr) == (1, "")
    first, second = found.stdout.splitlines()
    assert first.startswith(f"{altered} has {len(data)} bytes, xxh3 ") and "the index says" in first
    assert str(gone) in second
    altered.write_bytes(before[altered])
    gone.write_bytes(before[gone])
    assert make_shards("--verify", folder).returncode == 0, "times are no fault"
    tables = bytearray(before[folder / SAMPLES_NAME])
    tables[-1] ^= 1
    (folder / SAMPLES_NAME).write_bytes(tables)
    of_table = make_shards("--verify", folder)
    assert of_table.returncode == 1 and of_table.stdout.count("\n") == 1
    assert "000003.tar: " in of_table.stdout and "was altered or cut" in of_table.stdout


def test_help_shows_an_example() -> None:
    shown = make_shards("--help")
    assert shown.returncode == 0
    assert "python tools/make_shards.py photos/train data/train" in shown.stdout
    assert "make_shards.py --index-only OUT" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "out"], "missing is not a folder"),
        (["empty", "out"], "empty holds no image"),
        (["photos", "full"], "full is not an empty folder"),
        (["photos", "full/file"], "full/file is not an empty folder"),
        (["photos", "full/file/out"], "full/file/out"),
        (["photos", "out", "--samples-per-shard", "0"], "at least 1, got 0"),
        (["photos"], "give IMAGES and OUT"),
        (["--index-only", "missing"], "missing is not a folder"),
        (["--index-only", "empty"], "empty has no shard with images"),
        (["--index-only", "full"], "0.tar is not a sound shard"),
        (["--index-only", "photos", "full"], "--index-only takes OUT alone"),
        (["--verify", "photos", "full"], "--verify takes OUT alone"),
        (["--verify", "full"], "full has no index.json"),
        (["--verify", "--skip-bad", "full"], "--skip-bad is not for --verify"),
        (["photos", "out", "--part", "1/2"], "--part is for --index-only"),
        (["photos", "out", "--processes", "2"], "--processes is for --index-only and --verify"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("photos").symlink_to(PHOTOS / "val")
    Path("full").mkdir()
    Path("full/file").write_text("")
    Path("full/0.tar").write_text("not a tar")
    ended = make_shards(*arguments)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ") and message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.rglob(INDEX_NAME)) and not Path("out").exists()


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_run_tool_reports_a_mistake_in_one_line(
    capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def main() -> None:
        raise error("first line\n  second line")

    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: first line second line\n")


def test_run_tool_lets_success_and_our_own_bugs_through() -> None:
    done = []
    run_tool(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(AssertionError):
        run_tool(_broken)


def _broken() -> None:
    raise AssertionError("a bug")


def test_an_image_that_cannot_be_decoded_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "text.jpg").write_text("not a picture")
    done = run_python("tools/make_shards.py", str(tmp_path / "images"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: take out what no training could read, or ")
    assert "text.jpg: cannot decode the image: it is no JPEG, PNG or WebP" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
