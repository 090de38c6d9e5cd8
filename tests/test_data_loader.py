"""The processes that read ahead: they end with the one that they read for, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.conftest import ROOT
from vqrae_ds.data.loader import Item, load

# The reference in the module outlives the loop, as a traceback's would.
SCRIPT = """
import sys
import torch
from torch.utils.data import Dataset
from vqrae_ds.data.loader import Item, load

class Images(Dataset):
    def __getitems__(self, numbers):
        return [Item(torch.zeros(3, 4, 4), str(number)) for number in numbers]

def main():
    global batches
    batches = load(Images(), [range(2)] * 100, 2, 2)
    assert next(batches).keys == ["0", "1"]
    {end}

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("end", "status"), [("return", 0), ("raise OSError('gone')", 1), ("sys.exit(3)", 3)]
)
def test_a_process_ends_with_its_workers(end: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stderr.decode()
    assert b"is killed by signal" not in done.stderr, "their end is meant"


class Images(Dataset):
    def __getitem__(self, number: int) -> Item:
        return Item(torch.zeros(3, 4, 4), str(number))


def test_more_workers_than_cores_are_no_warning() -> None:
    workers = len(os.sched_getaffinity(0)) + 1
    with pytest.warns(UserWarning, match="This DataLoader will create"):
        DataLoader(Images(), num_workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = load(Images(), [range(2)], workers, 2)
    assert [batch.keys for batch in batches] == [["0", "1"]]
