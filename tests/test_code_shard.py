"""Files of codes: what is written is what is read, by others too, and no changed byte passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vqrae_ds.tokenizing.code_shard import (
    Codes,
    Source,
    encode_shard,
    is_sound,
    map_codes,
    read_columns,
    read_header,
)
from vqrae_ds.tokenizing.code_shard import SkippedSample as Skipped

SOURCE = Source("00003.tar", 10240, "ab" * 16, 6)
HOSTILE = ["../../etc/passwd", "猫/größe", 'seal_xxh3_128": "' + "0" * 32, ""]
SKIPPED = [Skipped(4, 'a "key"', "corrupt"), Skipped(5, HOSTILE[2], "empty")]


def some_codes(number: int) -> Codes:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 1 << 16, (number, 3, 5)).astype(np.uint16)
    crops = draw.integers(0, 5000, (number, 5)).astype(np.int32)
    return Codes(codes, np.arange(number, dtype=np.int32), crops, HOSTILE[:number])


def write(path: Path, codes: Codes) -> bytes:
    parts = {"job": "cd" * 16, "source": SOURCE, "skipped": SKIPPED}
    data = encode_shard(codes, **parts, made_with={"batch_size": 2})
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("number", [0, 1, 4])
def test_what_is_written_is_what_is_read(tmp_path, number):
    codes, path = some_codes(number), tmp_path / "codes"
    data = write(path, codes)
    header = read_header(path)
    assert header[:4] == (path, len(data), header.seal, "cd" * 16)
    assert (header.source, header.skipped) == (SOURCE, tuple(SKIPPED))
    assert (header.made_with, header.shape) == ({"batch_size": 2}, (number, 3, 5))
    assert is_sound(header)
    found = read_columns(header)
    assert found.keys == codes.keys
    for ours, written in zip(found[:3], codes[:3], strict=True):
        assert ours.dtype == written.dtype
        np.testing.assert_array_equal(ours, written)
    theirs = load_file(path)
    np.testing.assert_array_equal(theirs["codes"], codes.codes_Nhw)
    assert bytes(theirs["keys"]) == "\0".join(codes.keys).encode()
    assert write(path, codes) == data, "the same codes give the same bytes"


def test_codes_are_mapped_and_not_read(tmp_path):
    write(tmp_path / "codes", some_codes(4))
    mapped = map_codes(read_header(tmp_path / "codes"))
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / "codes"
    data = write(path, some_codes(2))
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            header = read_header(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is no file of codes")
        else:
            assert not is_sound(header), at


def test_a_cut_or_longer_file_is_found(tmp_path):
    path = tmp_path / "codes"
    data = write(path, some_codes(2))
    for changed in (*(data[:end] for end in range(0, len(data), 5)), data + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is no file of codes"):
            read_header(path)
