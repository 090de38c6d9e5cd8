"""The choice of the attention, on machines that differ in what PyTorch reports of them."""

from __future__ import annotations

import logging

import pytest
import torch

from vqrae_ds.attention import choose_attention


@pytest.mark.parametrize(("on_gpu", "bf16"), [(False, True), (True, False)])
def test_without_a_gpu_or_bf16(caplog: pytest.LogCaptureFixture, on_gpu: bool, bf16: bool) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_attention(on_gpu=on_gpu, bf16=bf16) == "sdpa"
    assert caplog.messages == [
        "attention of the decoder: PyTorch's scaled_dot_product_attention",
        "attention of the encoder: sdpa (flash attention needs CUDA and bf16)",
    ]


def test_a_gpu_that_is_too_old(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with caplog.at_level(logging.INFO):
        assert choose_attention(on_gpu=True, bf16=True) == "sdpa"
    assert "needs compute capability 8.0, this GPU has 7.5" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("installed", "expected"), [(False, "sdpa"), (True, "flash_attention_2")], ids=["no", "yes"]
)
def test_whether_flash_attn_is_installed(
    tmp_path, monkeypatch: pytest.MonkeyPatch, installed: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    if installed:
        (tmp_path / "flash_attn.py").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert choose_attention(on_gpu=True, bf16=True) == expected
