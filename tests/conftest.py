# SPDX-License-Identifier: Apache-2.0
"""Makes the helper modules beside the tests importable and skips what this machine can't run, with the reason."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_global_seed():
    """The same random data in every run, in any order of tests."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, this machine has none"))
