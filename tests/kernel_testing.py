# SPDX-License-Identifier: Apache-2.0
"""Where kernel tests run: on a GPU, or in Triton's interpreter if TRITON_INTERPRET=1 was set before Python started.

Without either, ``test_kernels_gemm_interpreter.py`` starts the same tests in a process that has it set.
"""

import os

import pytest
import torch

from vllm_comet.kernels._triton import HAS_TRITON

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9

needs_kernels = pytest.mark.skipif(
    not HAS_TRITON or not (GPU or INTERPRET),
    reason="no CUDA GPU and TRITON_INTERPRET=1 is not set: test_kernels_gemm_interpreter.py runs this" if HAS_TRITON
    else "Triton is not installed",
)  # fmt: skip
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (wgmma, bulk tensor copies)")
