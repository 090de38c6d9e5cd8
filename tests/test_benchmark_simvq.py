"""The benchmark of SimVQ: its implementations agree, its turns, and what it counts as a mistake."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from tests.conftest import run_python
from vqrae_ds.benchmarks.simvq import find_mistakes, measure_simvq, take_turns
from vqrae_ds.benchmarks.simvq_peers import OURS, PEERS, Sizes, make, make_ours, tokens

SMALL = Sizes(num_codes=200, dim=24)


@pytest.mark.parametrize("peer", PEERS)
def test_all_compute_the_same(peer: str) -> None:
    found = {}
    for name in (OURS, peer):
        z_1ND = tokens(50, SMALL.dim).requires_grad_()
        z_q, _, indices = make(name, SMALL)(z_1ND)
        z_q.square().sum().backward()
        found[name] = (z_q, indices, z_1ND.grad)
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_textbook_has_our_loss_and_gradient_of_the_projection() -> None:
    found = []
    for name in (OURS, "textbook"):
        quantize = make(name, SMALL)
        loss = quantize(tokens(50, SMALL.dim)).vq_loss
        loss.backward()
        found.append((loss, *(p.grad for p in quantize.parameters() if p.requires_grad)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_they_take_turns() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = take_turns(steps, 3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_tie_is_the_first_code_or_a_mistake() -> None:
    """Of codes 1 and 2 float64 cannot tell which is nearer, of 0 and 3 it can, if only just."""
    places = [3 * (1 + 2.0**-30), 3, -3 * (1 - 2.0**-52), 4]
    z_ND, codes_KD = torch.zeros(1, 1), torch.tensor(places, dtype=torch.float64)[:, None]
    found = [find_mistakes(torch.tensor([index]), z_ND, codes_KD) for index in range(4)]
    assert [tuple(f) for f in found] == [(1, 1), (1, 0), (1, 1), (1, 1)]
    assert find_mistakes(torch.tensor([0]), z_ND, codes_KD[[0, 3]]) == (0, 0)


def test_what_ours_finds_is_no_mistake_and_a_neighbour_is() -> None:
    ours, z_1ND = make_ours(SMALL), tokens(300, SMALL.dim)
    codes_KD = ours.searched_codes().codes_KD
    index_N = ours.find_codes(z_1ND)[0]
    assert find_mistakes(index_N, z_1ND[0], codes_KD).wrong == 0
    others_N = torch.where(torch.arange(300) < 7, (index_N + 1) % SMALL.num_codes, index_N)
    assert find_mistakes(others_N, z_1ND[0], codes_KD).wrong == 7


@pytest.mark.slow
def test_the_whole_benchmark_small() -> None:
    threads = torch.get_num_threads()
    report = measure_simvq(rounds=2, sizes=SMALL)
    assert torch.get_num_threads() == threads
    rows = {row.metric: row for row in report.rows}
    assert list(rows)[:4] == [
        "time_n1024",
        "time_n4096",
        "peak_memory_n4096",
        "accumulation_reuse_n1024",
    ]
    assert rows["time_n1024"].peer_name in PEERS
    assert rows["wrong_codes_n1024"].ours == rows["wrong_codes_n4096"].ours == 0
    assert all(row.ours > 0 for name, row in rows.items() if name.startswith("time"))
    memory = report.details["memory"]
    assert rows["peak_memory_n4096"].ours == median(memory["default"][OURS])
    matrix = 4096 * SMALL.num_codes * 4 / 1e6
    assert all(min(memory[a]["textbook"]) > matrix for a in ("default", "mmap"))


def test_a_mistake_is_one_line() -> None:
    done = run_python("tools/benchmark.py", "simvq", "--rounds", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --rounds 1 has no spread: 2 or more\n"
