"""The cluster of these tests: once a module, and a reason where there can be none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import MiniCluster, why_not


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MiniCluster]:
    """A cluster of two nodes, or what the module says: `CLUSTER = {"nodes": 3, "MC_GRACE": "5"}`.

    Where none can come up the test is skipped; with VQRAE_REQUIRE_CLUSTER=1 it fails.
    """
    if reason := why_not():
        if os.environ.get("VQRAE_REQUIRE_CLUSTER") == "1":
            pytest.fail(f"VQRAE_REQUIRE_CLUSTER=1, but {reason}")
        pytest.skip(reason)
    settings = getattr(request.module, "CLUSTER", {})
    with MiniCluster(tmp_path_factory.mktemp("cluster") / "state", **settings) as cluster:
        yield cluster
