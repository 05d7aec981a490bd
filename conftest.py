"""Settings shared by tests and benchmarks: the measuring plugin, GPU skips, hypothesis profiles."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: parallel test processes, each with a thread per core, starve one
    # another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

pytest_plugins = ("cs336_systems.measure.pytest_plugin", "pytester")

hypothesis.settings.register_profile("dev", deadline=None, max_examples=30)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine cannot run, saying what it would take."""
    found = torch.cuda.device_count()
    for item in items:
        wanted = 1 if item.get_closest_marker("gpu") else 0
        if marker := item.get_closest_marker("multigpu"):
            wanted = marker.args[0]
        if found < wanted:
            plural = "" if wanted == 1 else "s"
            item.add_marker(
                pytest.mark.skip(reason=f"needs {wanted} CUDA device{plural}, found {found}")
            )


@pytest.fixture
def device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
