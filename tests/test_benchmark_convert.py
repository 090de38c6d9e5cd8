"""The benchmark of the conversion: its checkpoint, its measure of a process, its comparison."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import run_python
from vqrae_ds.benchmarks.convert import Cost, Costs, count_differing, measure, take_turns
from vqrae_ds.benchmarks.zero_checkpoint import Shape, write_checkpoint
from vqrae_ds.conversion.inspection import inspect

SHAPE = Shape(width=8, num_frozen=2, num_trained=3)


def test_the_checkpoint_is_one(tmp_path):
    write_checkpoint(tmp_path / "step_00001000", SHAPE, num_ranks=3)
    found = inspect(tmp_path / "step_00001000", verify=True)
    assert found.damage == []
    numbers = {kind: 0 for kind in ("frozen", "trainable", "buffer")}
    for tensor in found.tensors:
        numbers[tensor.kind] += tensor.numel
    block = 12 * 8 * 8 + 211
    assert numbers == {"frozen": 2 * block, "trainable": 3 * block, "buffer": 8}
    assert SHAPE.numel == 5 * block


def test_zeros_take_no_room(tmp_path):
    shape = Shape(width=256, num_frozen=2, num_trained=3)
    write_checkpoint(tmp_path / "step_00001000", shape, num_ranks=2, filled=False)
    assert inspect(tmp_path / "step_00001000", verify=True).damage == []
    files = list(tmp_path.rglob("*.pt"))
    sizes = [path.stat().st_size for path in files]
    assert sum(sizes) > 2 * 4 * shape.numel
    assert sum(path.stat().st_blocks * 512 for path in files) < sum(sizes) / 4
    states = [torch.load(path) for path in sorted(files) if "optim" in path.name]
    assert not any(s["optimizer_state_dict"]["fp32_flat_groups"][0].any() for s in states)


def test_what_a_process_takes():
    idle = measure([sys.executable, "-c", "pass"])
    work = "x = bytearray(b'1') * (100 << 20)\nfor _ in range(20_000_000): pass"
    busy = measure([sys.executable, "-c", work])
    assert 90e6 < busy.peak_anonymous_bytes - idle.peak_anonymous_bytes < 130e6
    assert busy.cpu_seconds > idle.cpu_seconds + 0.1
    with pytest.raises(RuntimeError, match="ended with 3.*the reason"):
        measure([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"])


def test_both_sides_take_turns(tmp_path):
    log = tmp_path / "log"
    commands = {
        side: [sys.executable, "-c", f"open({str(log)!r}, 'a').write('{side} ')"]
        for side in ("ours", "peer")
    }

    def end_of_round(number: int) -> None:
        with log.open("a") as file:
            file.write(f"{number} ")

    costs = take_turns(commands, 3, end_of_round)
    assert log.read_text() == "ours peer 0 peer ours 1 ours peer 2 "
    assert [len(costs.ours), len(costs.peer)] == [3, 3]


def test_each_figure_has_a_median_of_its_own():
    costs = Costs([Cost(1, 9, 5), Cost(3, 7, 4), Cost(2, 8, 6)], [Cost(4, 4, 4)] * 3)
    assert costs.medians() == (Cost(2, 8, 5), Cost(4, 4, 4))


def test_differences_of_two_folders_are_counted(tmp_path):
    tensors = {"a": torch.tensor([0.0, 1.0]), "b": torch.ones(3).bfloat16(), "c": torch.ones(2)}
    for name, prefix in (("ours", ""), ("peer", "vqrae.")):
        (tmp_path / name).mkdir()
        named = {prefix + n: tensor for n, tensor in tensors.items()}
        save_file(named, tmp_path / name / "model.safetensors")
    assert count_differing(tmp_path / "ours", tmp_path / "peer") == 0
    other = {"a": torch.tensor([-0.0, 1.0]), "b": torch.ones(3), "d": torch.ones(2)}
    save_file(other, tmp_path / "ours" / "model.safetensors")
    assert count_differing(tmp_path / "ours", tmp_path / "peer") == 4, "a bit, a dtype, c and d"


@pytest.mark.slow
def test_the_whole_benchmark_small(tmp_path):
    target = tmp_path / "rows.json"
    arguments = ["--parameters", "1e6", "--rounds", "2"]
    arguments += ["--folder", str(tmp_path), "--json", str(target)]
    done = run_python("tools/benchmark.py", "convert", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text())
    rows = {row["metric"]: row for row in report["rows"]}
    assert rows["tensors_that_differ_25M"]["ours"] == 0
    memory = rows["peak_anonymous_memory_above_start_25M"]
    assert memory["ratio"] < 0.2 and memory["peer"] > 50
    for side, rounds in report["details"]["25M"].items():
        seconds = rounds["cpu_seconds"]
        assert len(seconds) == 2 and min(seconds) > 0
        assert rows["cpu_time_25M"][side] == pytest.approx(sum(seconds) / 2)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parameters", "10"], "--parameters 10"),
        (["--folder", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = run_python("tools/benchmark.py", "convert", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
