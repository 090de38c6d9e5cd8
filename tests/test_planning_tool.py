"""tools/plan_memory.py: what it prints, which mistakes it refuses, and what it does without."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.config_files import write_files
from tests.conftest import run_python, start_python


def plan_memory(folder: Path, *arguments: str) -> Any:
    return run_python(*command(folder), *arguments)


def command(folder: Path) -> list[str]:
    files = ["--config", str(folder / "config.yaml")]
    files += ["--deepspeed_config", str(folder / "deepspeed.json")]
    return ["tools/plan_memory.py", *files]


def test_the_tool_needs_neither_data_nor_weights(tmp_path: Path) -> None:
    write_files(tmp_path, "data.train=gone", "losses.adversarial={}", "run.output_dir=gone")
    done = plan_memory(tmp_path, "--gpus", "8", "--gpu-memory", "80", "model.num_embeddings=64")
    assert (done.returncode, done.stderr) == (0, "")
    assert "batch:  64 = 1 micro x 8 accumulated x 8 ranks" in done.stdout
    assert "SimVQ: 64 codes of 1536" in done.stdout and "of 80 GB a GPU" in done.stdout
    shown = run_python("tools/plan_memory.py", "--help")
    assert shown.returncode == 0 and "--gpus 8 --gpu-memory 80" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "3"], "with this micro batch it can run on 1, 2, 4, 8 ranks"),
        (["--gpus", "0"], "--gpus 0 is not a number of GPUs: 1 or more"),
        (["--gpus", "x"], "argument --gpus: invalid int value: 'x' (--help shows an example)"),
        (["--gpus", "8", "--gpu-memory", "0"], "--gpu-memory 0 is not a size in GB: above 0"),
        (["--gpus", "8", "run.epoch=3"], "run.epoch = 3 is not a key of the YAML; did you mean"),
        ([], "one of the arguments --gpus --sweep is required (--help shows an example)"),
        (["--sweep", "8,x"], "--sweep 8,x is no list of numbers of GPUs: 8,64,512 for example"),
        (["--sweep", "8,3"], "with this micro batch it can run on 1, 2, 4, 8 ranks"),
        (["--gpus", "8", "--mfu", "40"], "--mfu 40 is no share of the peak: above 0, at most 1"),
        (["--gpus", "8", "--peak-tflops", "0"], "--peak-tflops 0 is not a peak in TFLOP/s: above"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], expected: str) -> None:
    """It does not wait for torch."""
    write_files(tmp_path)
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    all_arguments = [*command(tmp_path), "--gpu-memory", "80", *arguments]
    process = start_python(*all_arguments, path=tmp_path)
    shown, error = process.communicate()
    assert (process.returncode, shown) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error


def test_the_tool_shows_all_of_it(tmp_path: Path) -> None:
    write_files(tmp_path, "losses.adversarial={}")
    done = run_python(*command(tmp_path), "--gpus", "8", "--peak-tflops", "100", "--mfu", "0.3")
    assert (done.returncode, done.stderr) == (0, "")
    for text in (
        "141 GB a GPU: fits on 8",
        "disk for checkpoints: ",
        "received by a GPU in a step",
    ):
        assert text in done.stdout
    assert "at an MFU of 30% of 100 TFLOP/s" in done.stdout and "recommended on 8" in done.stdout
    sweep = run_python(*command(tmp_path), "--sweep", "2,8,64", "--peak-tflops", "100")
    assert sweep.returncode == 0 and len(sweep.stdout.splitlines()) == 4


@pytest.mark.parametrize(
    ("given", "columns"), [("24", "24 40 80 141"), ("96.5", "40 80 96.5 141"), ("80", "40 80 141")]
)
def test_the_given_memory_is_among_the_sizes(tmp_path: Path, given: str, columns: str) -> None:
    write_files(tmp_path)
    sweep = plan_memory(tmp_path, "--sweep", "2,8", "--gpu-memory", given)
    head = sweep.stdout.splitlines()[0]
    assert re.findall(r"  ([\d.]+) GB", head) == columns.split()
    shown = plan_memory(tmp_path, "--gpus", "2", "--gpu-memory", given).stdout
    assert re.findall(r"^([\d.]+) GB a GPU: ", shown, re.MULTILINE) == columns.split()
