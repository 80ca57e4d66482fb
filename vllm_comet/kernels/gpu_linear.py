# SPDX-License-Identifier: Apache-2.0
"""W4Ax linear layer on a GPU: one activation-quantisation kernel, one GEMM kernel (``kernels/ops.py``)."""

from __future__ import annotations

import torch

from vllm_comet.kernels import ops
from vllm_comet.kernels.linear import LinearWeight


class GpuLinear(torch.nn.Module):
    """Weights repacked once into the layout of the device's GEMM kernel. ``weight`` comes from ``sort_blocks``."""

    def __init__(self, weight: LinearWeight, split: int, low_bits: int) -> None:
        super().__init__()
        packed = ops.pack_weight(weight.packed, weight.group_scale, weight.group_size, split)
        self.register_buffer("packed", packed.packed, persistent=False)
        self.register_buffer("group_scale", packed.group_scale, persistent=False)
        self.register_buffer("counters", packed.counters, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("perm", weight.perm, persistent=False)
        self.n, self.k, self.group_size, self.layout = packed.n, packed.k, packed.group_size, packed.layout
        self.split = split
        self.low_bits = low_bits

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        codes, scales = torch.ops.vllm_comet.quantize_activation(x, self.perm, self.split, self.low_bits)
        return torch.ops.vllm_comet.w4ax_linear(
            codes, scales, self.packed, self.group_scale, self.counters, self.scale, bias, self.n, self.k,
            self.group_size, self.split, self.layout, x.dtype)
