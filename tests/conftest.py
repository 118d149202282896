"""The kernels' tests run the real Triton kernels: on the GPU where there is one, else in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which `kernels` does later

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run where the kernels run are a GPU's: `-m gpu` selects them there."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random inputs in every run, whichever tests are selected."""
    torch.manual_seed(0)
