"""The processes that read ahead end with the one that they read for, however that ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

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
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr.decode()
    assert b"is killed by signal" not in done.stderr, "their end is meant"
