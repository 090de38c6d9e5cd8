"""Neighbours, votes, the linear probe and labels against loops, an optimizer and files by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from tests.conftest import ROOT
from tests.tars import write_tar
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.evaluation.labels import read_labels
from vqrae_ds.evaluation.linear_probe import PENALTY, choose_tested, fit, linear_probe
from vqrae_ds.evaluation.neighbours import agreement, nearest, vote_accuracy


def features(number: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def neighbours_by_hand(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows = rows.astype(np.float64) - rows.astype(np.float64).mean(0)
    cosines = np.array([[a @ b / np.sqrt(a @ a * (b @ b)) for b in rows] for a in rows])
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1)[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


def test_neighbours_votes_and_agreement_are_those_of_loops() -> None:
    first, second = features(), features(seed=1) + 0.5 * features()
    numbers, cosines = neighbours_by_hand(first.numpy(), 7)
    found = nearest(first, 7)
    assert np.array_equal(found.numbers_nk.numpy(), numbers)
    np.testing.assert_allclose(found.cosines_nk.numpy(), cosines, atol=1e-12)
    others, _ = neighbours_by_hand(second.numpy(), 7)
    shared = [len(set(a) & set(b)) / 7 for a, b in zip(numbers, others, strict=True)]
    assert agreement(first, second, 7) == pytest.approx(np.mean(shared))
    labels = (first[:, 0] > 0).long() + (first[:, 1] > 1).long()
    hits = 0
    for image in range(len(first)):
        votes = np.zeros(3)
        for neighbour, cosine in zip(numbers[image], cosines[image], strict=True):
            votes[labels[neighbour]] += np.exp(cosine / 0.07)
        hits += votes.argmax() == labels[image]
    assert 0 < hits < len(first)
    assert vote_accuracy(first, labels, 7) == pytest.approx(hits / len(first))


def test_an_offset_that_all_share_changes_nothing_and_copies_agree() -> None:
    rows = features().double()
    assert torch.equal(nearest(rows + 100, 5).numbers_nk, nearest(rows, 5).numbers_nk)
    assert agreement(rows, 3 * rows - 1, 5) == 1
    unrelated = np.mean([agreement(rows, features(seed=s), 8) for s in range(1, 9)])
    assert unrelated == pytest.approx(8 / 39, abs=0.05), "k / (n - 1), as its docstring says"


def test_the_probe_is_the_minimum_of_its_penalised_likelihood() -> None:
    rows, labels = features().double(), torch.arange(40) % 3
    found = fit(rows, labels, 3)

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        logits = rows.numpy() @ weight.T + bias
        log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -log_share[np.arange(40), labels].mean() + PENALTY / 2 * (weight**2).sum()

    best = minimize(loss, np.zeros(21), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.weight_CD.flatten(), best.x[:18], atol=1e-4)
    ours = np.concatenate([found.weight_CD.flatten(), found.bias_C])
    assert loss(ours) <= best.fun + 1e-10


def test_the_probe_reads_what_is_there_and_no_more() -> None:
    labels = torch.arange(100) % 2
    is_tested = choose_tested(labels)
    assert is_tested.nonzero().flatten().tolist() == [
        place for place in range(100) if place % 10 in (8, 9)
    ]
    rows = features(100, 4)
    rows[:, 3] = 5  # constant
    blind = linear_probe(rows, labels)
    assert blind.num_trained == 80 and blind.num_tested == 20 and blind.chance == 0.5
    assert 0.1 < blind.accuracy < 0.9
    rows[:, 0] += 6.0 * labels
    assert linear_probe(rows, labels).accuracy > 0.95
    assert linear_probe(rows[:8], torch.arange(8)) is None


def test_labels_come_from_cls_and_json_members_in_index_order(tmp_path: Path) -> None:
    image = find_images(ROOT / "tests/data/photos/val")[0].read_bytes()
    first = {"a.webp": image, "a.cls": b"7\n", "a.json": json.dumps({"label": "no"}).encode()}
    second = {
        "b.json": json.dumps({"label": "cat", "id": 3}).encode(),
        "b.webp": image,
        "c.webp": image,
        "d.txt": b"a caption",
        "d.webp": image,
        "d.json": json.dumps({"label": 7}).encode(),
    }
    write_tar(tmp_path / "0.tar", first.items())
    write_tar(tmp_path / "1.tar", second.items())
    index = index_shards(tmp_path)
    found = read_labels(index, "label")
    assert found.names == ["7", "cat"]
    assert found.labels_n.tolist() == [0, 1, -1, 0]
    assert read_labels(index, "id").labels_n.tolist() == [1, 0, -1, -1]
    assert read_labels(index, "label", num_images=3).labels_n.tolist() == [0, 1, -1]
    (tmp_path / "1.tar").unlink()
    assert read_labels(index, "label", num_images=1).names == ["7"], "nothing behind it is opened"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"a.json": b"{"}, "cannot be read as a label"),
        ({"a.json": b'{"label": [1]}'}, "neither text nor a whole number"),
        ({"a.cls": b"\xff"}, "cannot be read as a label"),
        ({"a.json": b"[" * 200_000}, "cannot be read as a label: maximum recursion depth"),
    ],
)
def test_a_label_that_is_none_is_refused(
    tmp_path: Path, member: dict[str, bytes], message: str
) -> None:
    image = find_images(ROOT / "tests/data/photos/val")[0].read_bytes()
    write_tar(tmp_path / "0.tar", [("a.webp", image), *member.items()])
    with pytest.raises(ValueError, match=message):
        read_labels(index_shards(tmp_path), "label")


def test_a_shard_that_was_cut_has_the_labels_before_the_cut(tmp_path: Path) -> None:
    image = find_images(ROOT / "tests/data/photos/val")[0].read_bytes()
    members = {"a.webp": image, "a.cls": b"1", "b.cls": b"2", "b.webp": image}
    write_tar(tmp_path / "0.tar", members.items())
    index = index_shards(tmp_path)
    with open(tmp_path / "0.tar", "r+b") as file:
        file.truncate(index.sample(1).offset - 1300)  # in the header of b.cls
    with pytest.raises(ValueError, match="no labels are read from .*0.tar"):
        read_labels(index, "label")
    assert read_labels(index, "label", skip_bad=True).labels_n.tolist() == [0, -1]


def test_without_labels_there_are_none(tmp_path: Path) -> None:
    image = find_images(ROOT / "tests/data/photos/val")[0].read_bytes()
    write_tar(tmp_path / "0.tar", [("a.webp", image), ("a.json", b'{"width": 3}')])
    assert read_labels(index_shards(tmp_path), "label") is None
