# SPDX-License-Identifier: Apache-2.0
"""Runs the kernel tests in Triton's interpreter, in a process of their own: the choice is made when kernels load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested on this machine's GPU")
@pytest.mark.parametrize("name", ["test_kernels_act_quant.py", "test_kernels_gemm.py"])
def test_in_interpreter(name):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
