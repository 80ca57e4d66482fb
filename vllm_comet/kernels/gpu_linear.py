# SPDX-License-Identifier: Apache-2.0
"""W4Ax linear layer on a GPU: one activation-quantisation kernel, one GEMM kernel (``kernels/ops.py``)."""

from __future__ import annotations

import torch

from vllm_comet.kernels import ops
from vllm_comet.kernels.linear import LinearWeight
from vllm_comet.kernels.tiles import choose_tile


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

    def compile_kernels(self, max_tokens: int, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        """Run every kernel that 1 to ``max_tokens`` tokens can choose, so that serving compiles none."""
        device = self.packed.device
        tiles = {}
        for m in range(max_tokens, 0, -1):
            tiles[choose_tile(device, self.layout, self.n, self.k, m)] = m
        for m in tiles.values():
            self(torch.zeros(m, self.k, dtype=dtype, device=device), bias)
