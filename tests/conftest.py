"""Test settings: eight CPU devices, a persistent compilation cache, and the small helpers that many tests share."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "jaxunlearn-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Networks in torch: only where torch is there can doctests be looked for in them.
collect_ignore = [] if importlib.util.find_spec("torch") else ["torch_clip.py", "torch_features.py"]


@pytest.fixture
def x64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data(repository) -> pathlib.Path:
    """Real images beside the checkout (MNIST, the T-shirt, CIFAR-10, faces), where they are there."""
    folder = repository.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder
